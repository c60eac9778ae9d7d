"""Weights in 8 bits with factors, as ComfyUI stores models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from img2img_server.engine.diffusers.scaled_weights import unscaled
from img2img_server.engine.family import ModelError

WEIGHT = torch.arange(-6.0, 6.0).reshape(3, 4)
FP8 = WEIGHT.to(torch.float8_e4m3fn)


def form(name: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "extra",
    [
        {
            "a.scale_weight": torch.tensor([0.5]),
            "scaled_fp8": FP8[0],
            "a.scale_input": torch.ones(1),
        },
        {"a.weight_scale": torch.tensor(0.5), "a.comfy_quant": form("float8_e4m3fn")},
        {"a.weight_scale": torch.tensor(0.5), "a.input_scale": torch.tensor(2.0)},
    ],
    ids=["older", "newer", "newer-with-metadata"],
)
def test_a_weight_is_multiplied_by_its_factor(extra: dict[str, Tensor]) -> None:
    norm = torch.ones(3)
    found = unscaled("", {"a.weight": FP8, "norm.weight": norm, **extra}, torch.float32)
    assert found.keys() == {"a.weight", "norm.weight"}
    assert torch.equal(found["a.weight"], WEIGHT / 2)
    assert found["norm.weight"] is norm


@pytest.mark.parametrize("shape", [(3,), (3, 1)], ids=str)
def test_a_factor_of_each_output_belongs_to_its_row(shape: tuple[int, ...]) -> None:
    square, factors = torch.ones(3, 3).to(torch.float8_e4m3fn), torch.tensor([1.0, 2.0, 3.0])
    own = {"a.weight": square, "a.weight_scale": factors.reshape(shape)}
    assert torch.equal(unscaled("", own, torch.float32)["a.weight"], factors[:, None].expand(3, 3))


def test_a_factor_of_each_output_of_a_convolution_belongs_to_its_row() -> None:
    factors = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    own = {"a.weight": torch.ones(3, 2, 3, 3).to(torch.float8_e4m3fn), "a.weight_scale": factors}
    found = unscaled("", own, torch.float32)["a.weight"]
    assert torch.equal(found, factors.expand(3, 2, 3, 3))


@pytest.mark.parametrize(
    "extra",
    [
        {"a.weight_scale": torch.ones(3, 2)},
        {"a.weight_scale": torch.tensor(1.0), "a.comfy_quant": form("nvfp4")},
        {"a.weight_scale": torch.tensor(1.0), "a.comfy_quant": torch.zeros(2, dtype=torch.uint8)},
        {"a.weight": torch.ones(3, 4, dtype=torch.int8), "a.weight_scale": torch.tensor(1.0)},
        {"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(2, 2)},
        {"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(1, 4)},
        {"a.weight_scale": torch.ones(3, dtype=torch.uint8)},
        {"a.weight": torch.tensor(1.0), "a.weight_scale": torch.ones(3)},
    ],
    ids=[
        "blocks",
        "four-bits",
        "no-json",
        "integers",
        "as-many-blocks-as-rows",
        "columns",
        "exponents",
        "no-rows",
    ],
)
def test_another_form_is_refused_with_what_to_do(extra: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"the text_encoder has .* not read .*: use the file"):
        unscaled("the text_encoder", {"a.weight": FP8, **extra}, torch.float32)
