"""Latent consistency models: Stable Diffusion distilled to a few steps, guidance as an input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.diffusers.families.sd import StableDiffusion


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

    def strength_arguments(self, strength: float) -> Mapping[str, Hashable]:
        return {"strength": strength}
