"""GetCapabilities and the validator have the same limits, for models of every family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_server.api import convert
from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import Limits, ValidationContext, validate
from img2img_server.engine.diffusers.families import families
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.model_spec import ModelSpec

SERVICE = Limits(max_side_pixels=1500)
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {"in_channels": 64, "out_channels": 64, "pos_embed_max_size": 61}
}
MODELS = {family.name: family for family in families()}


def info_of(name: str) -> ModelInfo:
    family = MODELS[name]
    traits = family.traits(ModelFiles({"_class_name": next(iter(family.pipelines))}, CONFIGS))
    spec = ModelSpec(
        source="",
        name=name,
        schedulers=traits.schedulers,
        scheduler=traits.scheduler,
        scheduler_max_steps=traits.scheduler_max_steps,
        multiple=traits.side_multiple,
        max_side=traits.max_side,
        native_size=traits.native_size,
        max_clip_skip=traits.max_clip_skip,
        max_num_inference_steps=60,
    )
    return spec.info


def is_valid(info: ModelInfo, **fields: Any) -> bool:
    spec = job_pb2.JobSpec(
        prompt="a boat", init_image=job_pb2.InitImage(url="https://example.com/a.png"), **fields
    )
    found = convert.request(spec, info.name, info, SERVICE, random_seed=1)
    limits = info.limits(SERVICE, found.params.scheduler)
    broken = validate(found.params, ValidationContext(limits, info.schedulers))
    return not found.violations and not broken


@pytest.mark.parametrize("name", MODELS)
def test_the_announced_limits_are_accepted_and_the_next_values_refused(name: str) -> None:
    info = info_of(name)
    model = convert.model(info, [], SERVICE)
    multiple = model.side_multiple
    least = -(-model.min_side_pixels // multiple) * multiple
    most = model.max_side_pixels // multiple * multiple

    assert is_valid(info)
    assert is_valid(info, width=least, height=most)
    assert is_valid(info, width=most, height=least)
    for side in (least - multiple, least + multiple // 2, most + multiple):
        assert not is_valid(info, width=side)
        assert not is_valid(info, height=side)
    for scheduler in model.schedulers:
        steps = min(
            model.scheduler_max_steps.get(scheduler, model.max_num_inference_steps),
            model.max_num_inference_steps,
        )
        assert is_valid(info, scheduler=scheduler, num_inference_steps=steps)
        assert not is_valid(info, scheduler=scheduler, num_inference_steps=steps + 1)
        assert not is_valid(info, scheduler=scheduler, num_inference_steps=0)


def test_a_model_that_skips_no_layers_announces_none() -> None:
    info = info_of("flux")
    assert convert.model(info, [], SERVICE).max_clip_skip == 0
    assert is_valid(info, clip_skip=SERVICE.max_clip_skip)
