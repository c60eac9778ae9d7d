"""Fills in the model's defaults and warns about options without effect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from img2img_server.domain.models import Guidance, ModelInfo
from img2img_server.domain.params import ImageFormat, JobParams, Limits
from img2img_server.domain.prompt_syntax import ambiguous_syntax
from img2img_server.domain.strength import StrengthMode, StrengthRule
from img2img_server.domain.warnings import no_preview

_NO_STEP = "At strength 0 no step runs: the prepared init image is returned."


def complete(given: Mapping[str, Any], model: ModelInfo | None, service: Limits) -> JobParams:
    """Returns the parameters of a request. Options that the caller did not set get the model's own
    defaults.

    Args:
        given: the options that the caller set, by their names in JobParams; not validated.
        model: None when no worker ever announced the model: defaults are those of JobParams.
        service: the limits of the service.
    """
    if model is None:
        return JobParams(**{"prompt": "", **given})
    limits = model.limits(service, given.get("scheduler", ""))
    defaults = {
        "prompt": "",
        "strength": model.default_strength,
        "num_inference_steps": min(
            model.default_num_inference_steps, limits.max_num_inference_steps
        ),
        "guidance_scale": model.default_guidance_scale,
        "scheduler": model.schedulers[0],
        # The sides of a square. The size of the init image is not known yet; see fit_size.
        "width": _side(model.native_size, limits),
        "height": _side(model.native_size, limits),
    }
    return JobParams(**{**defaults, **given})


def fit_size(
    given: Mapping[str, int], native_size: int, limits: Limits, image: tuple[int, int]
) -> tuple[int, int]:
    """Returns width and height of the result at the aspect ratio of the init image.

    Args:
        given: The sides that the caller set, by name.
        native_size: The side of a square of the model's native area.
        image: Width and height of the init image.
    """
    ratio = image[0] / image[1]
    width, height = given.get("width"), given.get("height")
    if width is None:
        width = _side(height * ratio if height else native_size * ratio**0.5, limits)
    if height is None:
        height = _side(
            given["width"] / ratio if "width" in given else native_size / ratio**0.5, limits
        )
    return width, height


def _side(pixels: float, limits: Limits) -> int:
    """Returns the nearest side within the limits that is a multiple of the model's
    side_multiple.
    """
    multiple = limits.side_multiple
    least = -(-limits.min_side_pixels // multiple)
    return multiple * min(max(round(pixels / multiple), least), limits.max_side_pixels // multiple)


def resolve(params: JobParams, model: ModelInfo, limits: Limits) -> tuple[JobParams, list[str]]:
    """Returns the parameters with a number of steps of which one at least can run.

    Args:
        params: Complete and valid parameters.
        limits: The limits of the model.

    Returns:
        The parameters of the run, and a sentence for each fact that the caller should know.
    """
    if params.strength_mode is StrengthMode.NOISE_LEVEL:
        warnings = [] if params.strength else [_NO_STEP]
    elif model.strength_rule is StrengthRule.ALL:
        params, warnings = _within_strength(params, model)
    else:
        params, warnings = _with_a_step(params, limits, model.strength_rule)
    return params, [*warnings, *_without_effect(params, model)]


def _with_a_step(
    params: JobParams, limits: Limits, rule: StrengthRule
) -> tuple[JobParams, list[str]]:
    steps, strength = params.num_inference_steps, params.strength
    if strength == 0:
        return params, [_NO_STEP]
    if rule.denoising_steps(strength, steps):
        return params, []
    most = limits.max_num_inference_steps
    enough = rule.least_inference_steps(strength, most)
    if enough is None:
        least = math.ceil(10_000 / most) / 10_000
        return params, [
            f"At strength {strength} no step runs, not even with num_inference_steps {most}, the "
            "largest that the model allows: the prepared init image is returned. The least "
            f"strength at which a step runs is {least:g}."
        ]
    warning = (
        f"num_inference_steps was raised from {steps} to {enough} so that one step runs at "
        f"strength {strength}."
    )
    return replace(params, num_inference_steps=enough), [warning]


def _within_strength(params: JobParams, model: ModelInfo) -> tuple[JobParams, list[str]]:
    """Lowers the number of steps to those whose noise in the schedule is below the strength."""
    steps, strength = params.num_inference_steps, params.strength
    if strength == 0:
        return params, [_NO_STEP]
    known = dict(model.scheduler_max_steps).get(params.scheduler, model.max_num_inference_steps)
    most = int(known * strength)
    if not most:
        least = f"The least strength at which a step runs is {1 / known:g}."
        return replace(params, strength=0.0), [
            f"At strength {strength} no step runs: the prepared init image is returned. {least}"
        ]
    if steps <= most:
        return params, []
    return replace(params, num_inference_steps=most), [
        f"num_inference_steps was lowered from {steps} to {most}, the largest number that the "
        f"model runs at strength {strength}."
    ]


def _without_guidance(params: JobParams, model: ModelInfo) -> Iterator[str]:
    name, scale, least = "guidance_scale", params.guidance_scale, model.guidance.off_up_to
    if model.takes_true_cfg_scale:
        name, least = "true_cfg_scale", 1.0
        scale = 1.0 if params.true_cfg_scale is None else params.true_cfg_scale
    if params.negative_prompt and not model.takes_negative_prompt:
        yield f"negative_prompt has no effect: the model {model.name} uses none."
    elif params.negative_prompt and scale <= least:
        yield (
            f"negative_prompt has no effect: {name} is {scale:g}, and only above {least:g} is it "
            "used."
        )
    is_given = params.guidance_scale != model.default_guidance_scale
    if is_given and model.guidance is Guidance.NONE:
        yield f"guidance_scale has no effect: the model {model.name} does not take it."
    if params.true_cfg_scale is None:
        return
    if not model.takes_true_cfg_scale:
        yield f"true_cfg_scale has no effect: the model {model.name} does not take it."
    elif not params.negative_prompt:
        yield "true_cfg_scale has no effect without negative_prompt."


def _weights_as_text(params: JobParams, model: ModelInfo) -> Iterator[str]:
    """Yields a sentence for each kind of weight that the model or the syntax makes text."""
    if not params.prompt_weights:
        return
    if not model.takes_prompt_weights:
        yield (
            f"prompt_weights has no effect: the model {model.name} reads brackets, numbers in them "
            "and BREAK as text."
        )
        return
    for name in ("prompt", "negative_prompt"):
        for sentence in ambiguous_syntax(getattr(params, name)):
            yield f"In {name}, {sentence}."


def _without_effect(params: JobParams, model: ModelInfo) -> Iterator[str]:
    yield from _without_guidance(params, model)
    for lora in params.loras:
        if lora.scale == 0:
            yield f"The LoRA {lora.name} has no effect at scale 0."
    if params.output_quality and params.output_format is ImageFormat.PNG:
        yield "output_quality has no effect on PNG."
    yield from _weights_as_text(params, model)
    if params.clip_skip and not model.max_clip_skip:
        yield f"clip_skip has no effect: the model {model.name} does not take it."
    if text := no_preview(
        params.preview_interval_steps,
        # With a noise level, the engine warns if only the exact number of steps shows it.
        model.most_denoising_steps(params),
        is_exact=params.strength_mode is StrengthMode.STEPS,
    ):
        yield text
