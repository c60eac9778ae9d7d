"""Recognises models that were distilled for few steps, with the defaults that their authors name.

There is one rule for all forms of a model. Its files come first: the scheduler, the pipeline and
fields such as `guidance_embeds`. Then the first of its names that says something decides: that of
the folder, file or repository, that of the operator, and those of the models from which it was
derived. A name can also say which kind of distillation the files mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from img2img_server.engine.model_names import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """One kind of distillation and its defaults.

    Attributes:
        names: Returns whether a name is that of such a model.
        num_inference_steps: The steps, unless the name of the model has a number of steps; None:
            those of the family.
        guidance_scale: None: that of the family.
        takes_named_steps: Whether a number of steps in the name replaces the default.
        schedulers: The schedulers that such models need. The model's own one is the default if it
            is among them, otherwise the first one is. Empty: every scheduler is one.
        scheduler_config: The entries of the scheduler of a single file, which has none itself.
        is_general: Whether the files of a model are more exact than this name.
    """

    names: Callable[[ModelName], bool]
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    takes_named_steps: bool = True
    schedulers: tuple[str, ...] = ()
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    is_general: bool = False


def find_distillation(
    kinds: Sequence[Distillation],
    names: Iterable[ModelName],
    stated: Distillation | None = None,
) -> Distillation | None:
    """Returns the kind of distillation of a model, with its steps; None for other models.

    Args:
        kinds: Those of its family, the first one that fits counts.
        names: Its own names first.
        stated: The kind that its files state.
    """
    for name in names:
        if name.is_reversed:
            return None
        if kind := next((kind for kind in kinds if kind.names(name)), None):
            if stated and kind.is_general:
                kind = stated
            return _with_steps(kind, name)
    return stated


def _with_steps(kind: Distillation, name: ModelName) -> Distillation:
    if kind.takes_named_steps and kind.num_inference_steps and name.num_steps:
        return replace(kind, num_inference_steps=name.num_steps)
    return kind


def _trailing(class_name: str) -> Mapping[str, Any]:
    return {"_class_name": class_name, "timestep_spacing": "trailing"}


_LCM_SCHEDULER: Final[Mapping[str, Any]] = {
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "timestep_spacing": "leading",
}
_CONSISTENCY: Final = ("lcm", "tcd")

_NO_MERGE: Final = (
    r"sd|xl|sdxl|turbo|sdturbo|sdxlturbo|stable|diffusion|stabilityai|diffusers|onnx|pruned|"
    r"v?\d+\w*|fp\d+|bf16"
)
# The published models SD-Turbo and SDXL-Turbo, not merges with them.
ORIGINAL_TURBO: Final = Distillation(
    names=lambda name: (
        name.has(r"sd-?(?:xl-?)?turbo|stable-diffusion-(?:xl-)?turbo")
        and not name.has(rf"(?!(?:{_NO_MERGE})-)\w+")
    ),
    num_inference_steps=4,
    guidance_scale=0.0,
)
LCM: Final = Distillation(
    names=lambda name: name.has(r"(?:sd\d*|\w*xl)?lcm(?:v?\d+)?"),
    num_inference_steps=8,
    guidance_scale=1.5,
    schedulers=_CONSISTENCY,
    scheduler_config=_LCM_SCHEDULER,
    is_general=True,
)
LCM_EMBEDDED: Final = replace(LCM, guidance_scale=8.5)
TCD: Final = Distillation(
    names=lambda name: name.describes("tcd"),
    num_inference_steps=8,
    guidance_scale=0.0,
    schedulers=("tcd", "lcm"),
    scheduler_config={"_class_name": "TCDScheduler", "timestep_spacing": "leading"},
)
_LIGHTNING: Final = Distillation(
    names=lambda name: (
        name.describes("lightning")
        and not name.has(r"(?:py)?torch-lightning|lightning-(?:logs|ai)")
    ),
    num_inference_steps=8,
    guidance_scale=0.0,
    scheduler_config=_trailing("EulerDiscreteScheduler"),
)
_HYPER: Final = Distillation(
    names=lambda name: (
        name.has(r"hyper-?sd(?:\d+|xl|v\d+)?") or name.describes("hyper", needs_detail=True)
    ),
    num_inference_steps=8,
    guidance_scale=0.0,
    scheduler_config=_trailing("DDIMScheduler"),
)
# Kinds of distillation of Stable Diffusion and SDXL.
UNET_DISTILLATIONS: Final = (
    # Hyper-SD has models that keep classifier-free guidance.
    replace(
        _HYPER,
        names=lambda name: _HYPER.names(name) and name.has("cfg"),
        guidance_scale=5.0,
    ),
    Distillation(
        names=lambda name: name.has(r"\w*dmd2"),
        num_inference_steps=4,
        guidance_scale=0.0,
        schedulers=_CONSISTENCY,
        scheduler_config=_LCM_SCHEDULER,
    ),
    Distillation(  # Flash Diffusion
        names=lambda name: name.has(r"flash-sd(?:\d+|xl|-xl)?"),
        num_inference_steps=4,
        guidance_scale=0.0,
        schedulers=_CONSISTENCY,
        scheduler_config=_LCM_SCHEDULER,
    ),
    Distillation(
        names=lambda name: name.has(r"sd-?xl-flash") and name.describes("flash", needs_detail=True),
        num_inference_steps=7,
        guidance_scale=3.0,
        scheduler_config={"_class_name": "DPMSolverSinglestepScheduler"},
    ),
    Distillation(  # phased consistency models
        names=lambda name: name.describes("pcm") and not name.has("normalcfg"),
        num_inference_steps=8,
        guidance_scale=0.0,
        scheduler_config=_trailing("DDIMScheduler"),
    ),
    Distillation(
        names=lambda name: name.describes("pcm"),
        num_inference_steps=8,
        scheduler_config=_trailing("DDIMScheduler"),
    ),
    TCD,
    Distillation(  # SDXL-Lightning for one step predicts the clean latents.
        names=lambda name: _LIGHTNING.names(name) and name.has("x0"),
        num_inference_steps=1,
        guidance_scale=0.0,
        scheduler_config={**_LIGHTNING.scheduler_config, "prediction_type": "sample"},
    ),
    _LIGHTNING,
    _HYPER,
    Distillation(names=lambda name: name.has("sdxs"), num_inference_steps=1, guidance_scale=0.0),
    LCM,
    ORIGINAL_TURBO,
    Distillation(  # Merges with a Turbo model run with little guidance.
        names=lambda name: name.describes("turbo") or name.has(r"turbo-?vision\w*"),
        num_inference_steps=8,
        guidance_scale=2.0,
        is_general=True,
    ),
)
