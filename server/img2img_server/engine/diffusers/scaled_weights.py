"""Reads weights in 8 bits with a factor for each of them, in the forms of ComfyUI.

The older form has `scale_weight` and `scaled_fp8`, the newer one `weight_scale` and `comfy_quant`,
which names the format. Factors of the inputs are for computing in 8 bits and are not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from img2img_server.engine.checkpoint import SCALED_FP8
from img2img_server.engine.family import ModelError

_FACTORS: Final = (".scale_weight", ".weight_scale")
_UNNEEDED: Final = (".scale_input", ".input_scale", ".comfy_quant")
_FORMATS: Final = ("float8_e4m3fn", "float8_e5m2")


def unscaled(where: str, own: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns tensors multiplied by their factors.

    Args:
        where: The place of the tensors, for sentences.
        dtype: The type of tensors that have a factor; all others stay as they are.

    Raises:
        ModelError: They are in a form with another number of bits, or with factors of blocks.
    """
    found = {}
    for key, tensor in own.items():
        if key.endswith(".comfy_quant"):
            _check_format(where, key, tensor)
        if key.endswith((*_FACTORS, *_UNNEEDED, SCALED_FP8)):
            continue
        layer = key.removesuffix(".weight")
        factor = next((own[layer + it] for it in _FACTORS if layer + it in own), None)
        if factor is None or layer == key:
            found[key] = tensor
            continue
        is_float = tensor.is_floating_point() and factor.is_floating_point()
        # (rows,), (rows, 1) or, of a convolution, (rows, 1, 1, 1)
        rows = factor.shape[:1]
        is_by_row = rows == tensor.shape[:1] and factor.numel() == rows.numel()
        if not is_float or (factor.numel() != 1 and not is_by_row):
            raise _refusal(where, f"{layer}{_FACTORS[1]}")
        shape = (-1, *[1] * (tensor.ndim - 1)) if factor.numel() > 1 else ()
        factor = factor.float().reshape(shape)
        found[key] = (tensor.float() * factor).to(dtype)
    return found


def _check_format(where: str, key: str, tensor: Tensor) -> None:
    """Raises ModelError if a tensor of `comfy_quant`, which is JSON, names a format of others."""
    try:
        form = json.loads(bytes(tensor.flatten().tolist()))["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise _refusal(where, key) from error
    if form not in _FORMATS:
        raise _refusal(where, f"{key}: {form}")


def _refusal(where: str, what: str) -> ModelError:
    return ModelError(
        f"{where} has weights in a form that is not read ({what}): use the file in fp16, bf16 or "
        "fp8 with one factor for each weight"
    )
