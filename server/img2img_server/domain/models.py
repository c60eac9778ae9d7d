"""What a worker tells about the model it serves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from img2img_server.domain.params import DEFAULT_STRENGTH, Limits
from img2img_server.domain.strength import StrengthRule

# The samplers that we run, by the class in diffusers that each one is.
SCHEDULER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "LCMScheduler": "lcm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "PNDMScheduler": "pndm",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler",
}


class ModelKind(StrEnum):
    """What a denoiser was trained for: noise of a variance schedule, or flow matching."""

    DIFFUSION = "diffusion"
    FLOW = "flow"


class Guidance(StrEnum):
    """What a model makes of guidance_scale.

    CLASSIFIER_FREE: above 1 a second forward with the negative prompt, as in Stable Diffusion.
    CLASSIFIER_FREE_FROM_ZERO: the same above 0, as in Z-Image. EMBEDDED: an input of the model.
    NONE: it has no effect.
    """

    CLASSIFIER_FREE = "classifier_free"
    CLASSIFIER_FREE_FROM_ZERO = "classifier_free_from_zero"
    EMBEDDED = "embedded"
    NONE = "none"

    @property
    def off_up_to(self) -> float:
        """The largest scale at which there is no guidance."""
        return 0.0 if self is Guidance.CLASSIFIER_FREE_FROM_ZERO else 1.0

    def forwards(self, scale: float) -> int:
        """Returns how many forwards of the model one step of a sample costs: 2 with
        classifier-free guidance."""
        is_free = self in (Guidance.CLASSIFIER_FREE, Guidance.CLASSIFIER_FREE_FROM_ZERO)
        return 2 if is_free and scale > self.off_up_to else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as callers see it: its name, its choices and its own defaults."""

    name: str
    family: str
    schedulers: tuple[str, ...]  # the default one first
    default_num_inference_steps: int
    default_guidance_scale: float
    default_strength: float = DEFAULT_STRENGTH
    native_size: int = 512
    max_num_inference_steps: int = 100
    side_multiple: int = 1  # of width and height, beside the service's own
    # Schedulers that run fewer steps than max_num_inference_steps, and how many.
    scheduler_max_steps: tuple[tuple[str, int], ...] = ()
    takes_negative_prompt: bool = True  # False: guidance is an input of the model, as with LCM
    kind: ModelKind = ModelKind.DIFFUSION
    strength_rule: StrengthRule = StrengthRule.FLOOR
    guidance: Guidance = Guidance.CLASSIFIER_FREE
    min_side_pixels: int = 0  # 0: no limit of the model's own
    max_side_pixels: int = 0
    loras: tuple[str, ...] = ()
    # Measured device seconds a pixel-step, batches and encoders included; kept with the model while
    # no worker serves it. 0.0: nothing ran yet.
    pixel_step_seconds: float = 0.0

    def limits(self, service: Limits, scheduler: str = "") -> Limits:
        """Returns the limits of a request for this model: the service's, narrowed by its own and by
        those of the scheduler; none: of the model's default one."""
        by_scheduler = dict(self.scheduler_max_steps)
        scheduler = scheduler or self.schedulers[0]
        return replace(
            service,
            max_num_inference_steps=min(
                service.max_num_inference_steps,
                self.max_num_inference_steps,
                by_scheduler.get(scheduler, service.max_num_inference_steps),
            ),
            side_multiple=math.lcm(service.side_multiple, self.side_multiple),
            min_side_pixels=max(service.min_side_pixels, self.min_side_pixels),
            max_side_pixels=min(
                service.max_side_pixels, self.max_side_pixels or service.max_side_pixels
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A live worker, announced again and again; it is gone when the announcement expires.

    `job_seconds`: recent mean time of one sample at
    512x512, the base of estimates; 0.0 when nothing ran yet. `busy`: share of the time since the
    announcement before in which the device worked, 0 to 1.
    """

    name: str
    model: ModelInfo
    device: str
    job_seconds: float = 0.0
    busy: float = 0.0
