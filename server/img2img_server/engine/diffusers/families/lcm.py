"""Latent consistency models: Stable Diffusion distilled to a few steps, guidance as an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.diffusers.families.sd import StableDiffusion
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from img2img_server.engine.sampler import Schedule


class LatentConsistency(StableDiffusion):
    """Models with a latent consistency pipeline: all steps run, and strength sets the first one."""

    name = "lcm"
    pipelines = dict.fromkeys(
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        "LatentConsistencyModelImg2ImgPipeline",
    )
    strength_rule = StrengthRule.ALL
    schedulers = ("lcm",)
    default_scheduler = "lcm"
    num_inference_steps = 4
    guidance_scale = 8.5

    def distillation(self, files: ModelFiles) -> Distillation | None:
        return None  # The class has defaults of its own.

    def strength_arguments(self, strength: float) -> Mapping[str, Hashable]:
        return {"strength": strength}

    def schedule_from_noise(
        self, make: Callable[..., Any], share: float, num_inference_steps: int
    ) -> Schedule:
        # The run begins at the nearest timestep of the distillation. No more steps run than it has
        # timesteps up to there.
        shares = (1 - make(strength=1.0).alphas_cumprod).sqrt()
        original = make(strength=1.0).config.original_inference_steps
        place = round(int((shares < share).sum()) * original / len(shares))
        place = min(max(place, 1), original)
        steps = min(num_inference_steps, place)
        strength = min(1.0, math.nextafter(place / original, 2.0))
        scheduler = make(num_inference_steps=steps, strength=strength)
        return self.derive_schedule(scheduler, steps, steps)
