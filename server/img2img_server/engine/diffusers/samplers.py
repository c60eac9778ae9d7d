"""The schedulers of diffusers that we offer, by our names. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from img2img_server.domain.models import ModelKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A scheduler class of diffusers and how we configure it.

    Attributes:
        class_name: Its name in diffusers.
        overrides: Entries of its configuration that we set whatever the model's own says.
        defaults: Entries that count where the model's configuration does not have them.
        kind: The kind of model that it samples.
        is_general: Whether every family of this kind can offer it.
    """

    class_name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    kind: ModelKind = ModelKind.DIFFUSION
    is_general: bool = True


# Clipping and thresholding are meant for pixels and are not linear; latents have no such range.
_NOT_CLIPPED: Final = {"clip_sample": False, "thresholding": False}

SAMPLERS: Final[Mapping[str, Sampler]] = {
    "ddim": Sampler(class_name="DDIMScheduler", overrides=_NOT_CLIPPED),
    "euler": Sampler(class_name="EulerDiscreteScheduler"),
    "euler_a": Sampler(class_name="EulerAncestralDiscreteScheduler"),
    "lcm": Sampler(class_name="LCMScheduler", overrides=_NOT_CLIPPED),
    "dpmpp_2m": Sampler(
        class_name="DPMSolverMultistepScheduler",
        overrides={"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False},
    ),
    # Without the Runge-Kutta steps, as in every published model that comes with PNDM.
    "pndm": Sampler(class_name="PNDMScheduler", defaults={"skip_prk_steps": True}),
    "flow_match_euler": Sampler(class_name="FlowMatchEulerDiscreteScheduler", kind=ModelKind.FLOW),
    "scm": Sampler(class_name="SCMScheduler", kind=ModelKind.FLOW, is_general=False),
}


def _general(kind: ModelKind) -> tuple[str, ...]:
    return tuple(
        name for name, sampler in SAMPLERS.items() if sampler.kind is kind and sampler.is_general
    )


DIFFUSION_SAMPLERS: Final = _general(ModelKind.DIFFUSION)
FLOW_SAMPLERS: Final = _general(ModelKind.FLOW)
