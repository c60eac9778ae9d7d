"""Fills a request with the model's defaults and warns about options without effect."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import JobParams, Limits
from img2img_server.domain.strength import StrengthRule


def resolve(
    params: JobParams, model: ModelInfo, limits: Limits, given: Collection[str]
) -> tuple[JobParams, list[str]]:
    """Fills in the model's defaults and raises the steps so that one runs.

    Args:
        params: valid ones, with a strength.
        limits: those of the model.
        given: names of the options that the caller set.

    Returns:
        The parameters of the run, and a sentence for each thing that the caller should know.
    """
    guidance = params.guidance_scale
    params = replace(
        params,
        num_inference_steps=params.num_inference_steps
        or min(model.default_num_inference_steps, limits.max_num_inference_steps),
        guidance_scale=model.default_guidance_scale if guidance is None else guidance,
        scheduler=params.scheduler or model.schedulers[0],
    )
    params, warnings = _with_a_step(params, limits, model.strength_rule)
    return params, [*warnings, *_without_effect(params, model, given)]


def _with_a_step(
    params: JobParams, limits: Limits, rule: StrengthRule
) -> tuple[JobParams, list[str]]:
    steps, strength = params.num_inference_steps or 1, params.strength
    if strength == 0:
        return params, ["At strength 0 no step runs: the prepared init image is returned."]
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


def _without_effect(params: JobParams, model: ModelInfo, given: Collection[str]) -> Iterator[str]:
    schedule = params.num_inference_steps or 1
    run = model.strength_rule.denoising_steps(params.strength, schedule)
    scale, least = params.guidance_scale or 0.0, model.guidance.off_up_to
    if params.negative_prompt and scale <= least:
        yield (
            f"negative_prompt has no effect: guidance_scale is {scale:g}, and only above "
            f"{least:g} is it used."
        )
    elif params.negative_prompt and not model.takes_negative_prompt:
        yield f"negative_prompt has no effect: the model {model.name} uses none."
    if "lora_scale" in given and not params.lora:
        yield "lora_scale has no effect without lora."
    if (every := params.preview_interval_steps) and every >= run > 0:
        steps = "1 step runs" if run == 1 else f"{run} steps run"
        yield f"No preview is sent: preview_interval_steps is {every} and {steps}."
