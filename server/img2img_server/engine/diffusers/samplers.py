"""The schedulers of diffusers that the service offers, by the service's names. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from img2img_server.domain.models import ModelKind
from img2img_server.engine.family import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A scheduler class of diffusers and how we configure it.

    Attributes:
        class_name: Its name in diffusers.
        overrides: Entries of its configuration that replace the model's own.
        defaults: Entries for models whose configuration does not have them.
        variant: Entries that distinguish samplers of one class; they also replace the model's own.
        kind: The kind of model that it samples.
        is_general: Whether every family of this kind can offer it.
    """

    class_name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    variant: Mapping[str, Any] = field(default_factory=dict)
    kind: ModelKind = ModelKind.DIFFUSION
    is_general: bool = True


# Clipping and thresholding are meant for pixels and are not linear; latents have no such range.
_NOT_CLIPPED: Final = {"clip_sample": False, "thresholding": False}
_UNCLIPPED: Final = {"thresholding": False}
_NO_OTHER_SIGMAS: Final = {
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}


def _dpm(algorithm: str, *, karras: bool) -> Sampler:
    return Sampler(
        class_name="DPMSolverMultistepScheduler",
        overrides=_UNCLIPPED | (_NO_OTHER_SIGMAS if karras else {}),
        variant={"algorithm_type": algorithm, "solver_order": 2, "use_karras_sigmas": karras},
    )


def _flow(*, stochastic: bool) -> Sampler:
    return Sampler(
        class_name="FlowMatchEulerDiscreteScheduler",
        kind=ModelKind.FLOW,
        variant={"stochastic_sampling": stochastic},
    )


# The first sampler of a class has the entries that diffusers assumes if a configuration has none.
SAMPLERS: Final[Mapping[str, Sampler]] = {
    "ddim": Sampler(class_name="DDIMScheduler", overrides=_NOT_CLIPPED),
    "euler": Sampler(class_name="EulerDiscreteScheduler"),
    "euler_a": Sampler(class_name="EulerAncestralDiscreteScheduler"),
    "lcm": Sampler(class_name="LCMScheduler", overrides=_NOT_CLIPPED),
    "dpmpp_2m": _dpm("dpmsolver++", karras=False),
    "dpmpp_2m_karras": _dpm("dpmsolver++", karras=True),
    "dpmpp_2m_sde": _dpm("sde-dpmsolver++", karras=False),
    "dpmpp_2m_sde_karras": _dpm("sde-dpmsolver++", karras=True),
    "dpmpp_2s": Sampler(
        class_name="DPMSolverSinglestepScheduler",
        overrides=_UNCLIPPED,
        variant={"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "heun": Sampler(class_name="HeunDiscreteScheduler", overrides={"clip_sample": False}),
    # No Runge-Kutta steps, as in every published model that comes with PNDM.
    "pndm": Sampler(class_name="PNDMScheduler", defaults={"skip_prk_steps": True}),
    "tcd": Sampler(class_name="TCDScheduler", overrides=_NOT_CLIPPED),
    "unipc": Sampler(class_name="UniPCMultistepScheduler", overrides=_UNCLIPPED),
    # Only models that were trained with these inputs and outputs have this sampler.
    "edm_euler": Sampler(class_name="EDMEulerScheduler", is_general=False),
    "edm_dpmpp_2m": Sampler(
        class_name="EDMDPMSolverMultistepScheduler",
        overrides=_UNCLIPPED,
        variant={"algorithm_type": "dpmsolver++", "solver_order": 2},
        is_general=False,
    ),
    "flow_match_euler": _flow(stochastic=False),
    "flow_match_euler_stochastic": _flow(stochastic=True),
    "scm": Sampler(class_name="SCMScheduler", kind=ModelKind.FLOW, is_general=False),
}


def own_sampler(config: Mapping[str, Any]) -> str:
    """Returns the service's name of a scheduler with this configuration, or "" if it offers
    none.
    """
    assumed: Mapping[str, Any] | None = None
    for name, sampler in SAMPLERS.items():
        if sampler.class_name == config.get("_class_name"):
            assumed = sampler.variant if assumed is None else assumed
            found = {key: config.get(key, value) for key, value in assumed.items()}
            if found == sampler.variant:
                return name
    return ""


def _general(kind: ModelKind) -> tuple[str, ...]:
    return tuple(
        name for name, sampler in SAMPLERS.items() if sampler.kind is kind and sampler.is_general
    )


DIFFUSION_SAMPLERS: Final = _general(ModelKind.DIFFUSION)
FLOW_SAMPLERS: Final = _general(ModelKind.FLOW)
EDM_SAMPLERS: Final = ("edm_dpmpp_2m", "edm_euler")
# The kinds of prediction that the schedulers of diffusers accept.
_PREDICTIONS: Final = ("epsilon", "v_prediction", "sample", "flow_prediction", "trigflow")
# Entries of schedulers that are numbers.
_NUMBERS: Final = ("beta_start", "beta_end", "num_train_timesteps", "shift", "steps_offset")


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raises ModelError for values that diffusers accepts at first and computes other images with.

    Args:
        config: The configuration of a model's own scheduler.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise ModelError(
            f"scheduler/scheduler_config.json has the prediction_type {prediction!r}, which does "
            f"not exist: correct it to one of {', '.join(_PREDICTIONS)}"
        )
    for name in _NUMBERS:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ModelError(
                f"scheduler/scheduler_config.json has {name} {value!r}, which is no number: "
                "correct it, or fetch the file again"
            )
