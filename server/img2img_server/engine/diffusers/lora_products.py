"""The forms of LyCORIS and kohya whose change is a product with the weight: GLoRA, OFT, BOFT, IA3.

The roles of their tensors are `glora_a1` to `glora_b2`, `oft_blocks` with `rescale`, and `ia3` with
`on_input`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

GLORA = frozenset({"glora_a1", "glora_a2", "glora_b1", "glora_b2"})
OFT = frozenset({"oft_blocks"})
IA3 = frozenset({"ia3", "on_input"})


def is_product(own: Mapping[str, Tensor]) -> bool:
    """Returns whether the tensors of a layer are of one of these forms."""
    return bool(own.keys() & (GLORA | OFT | IA3))


def product_sizes(own: Mapping[str, Tensor]) -> tuple[int, int]:
    """Returns the numbers of outputs and inputs of the layer; 0: the form does not say it.

    Raises:
        ValueError: The tensors do not fit each other.
    """
    if "oft_blocks" in own:
        *_, blocks, outputs, inputs = own["oft_blocks"].shape
        if outputs != inputs or own["oft_blocks"].ndim not in (3, 4):
            raise ValueError
        if "rescale" in own and own["rescale"].numel() != blocks * outputs:
            raise ValueError
        return blocks * outputs, 0
    if "ia3" in own:
        count = own["ia3"].numel()
        return (0, count) if own["on_input"].item() else (count, 0)
    first, second, third, fourth = _glora(own)
    if first.shape != second.T.shape or third.shape[1] != fourth.shape[0]:
        raise ValueError
    return third.shape[0], first.shape[0]


def fits(own: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Returns whether tensors can change a weight that has their outputs."""
    outputs, inputs, *kernel = weight.shape
    if "oft_blocks" in own:
        *times, _, size, _ = own["oft_blocks"].shape
        # BOFT rotates pairs of groups of outputs, which are twice as large in each rotation.
        return not times or (size % 2 == 0 and outputs % (2 ** times[0] * (size // 2)) == 0)
    has_inputs = product_sizes(own)[1] in (0, inputs)
    return has_inputs and ("ia3" in own or _glora(own)[3].shape[1] == inputs * math.prod(kernel))


def product_rank(own: Mapping[str, Tensor]) -> int | None:
    """Returns the rank of GLoRA; None for forms without a rank, whose alpha is no factor."""
    return _glora(own)[1].shape[0] if "glora_a1" in own else None


def product_change(
    own: Mapping[str, Tensor], weight: Tensor, scale: float, rows: Tensor | None
) -> Tensor:
    """Returns the difference from a weight.

    Args:
        own: The tensors by role, in float32.
        weight: The original weight in float32.
        scale: With GLoRA, alpha / rank is a part of it.
        rows: The outputs of the form that belong to the weight; None: all.
    """
    if "oft_blocks" in own:
        return _rotated(own, weight, scale) - weight
    ones = [1] * (weight.ndim - 2)
    if "ia3" in own:
        values = own["ia3"].flatten()
        if own["on_input"].item():
            return scale * weight * values.reshape(1, -1, *ones)
        values = values if rows is None else values[rows]
        return scale * weight * values.reshape(-1, 1, *ones)
    first, second, third, fourth = _glora(own)
    third = third if rows is None else third[rows]
    inner = torch.einsum("oi...,ir,rj->oj...", weight, first, second)
    return scale * (inner + (third @ fourth).reshape(weight.shape))


def _glora(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the factors of W A1 A2 + B1 B2. Older versions of LyCORIS have the other order."""
    a1, a2, b1, b2 = (own[role].flatten(1) for role in sorted(GLORA))
    return (a2, a1, b2, b1) if a1.shape[0] < a1.shape[1] else (a1, a2, b1, b2)


def _rotated(own: Mapping[str, Tensor], weight: Tensor, scale: float) -> Tensor:
    """Returns a weight whose outputs are rotated in blocks, by (I + Q) / (I - Q) of Cayley."""
    blocks = own["oft_blocks"]
    size, inner = blocks.shape[-1], weight.shape[1:]
    skew = blocks - blocks.transpose(-1, -2)
    if "alpha" in own and (most := own["alpha"].item() * weight.shape[0]) > 0:
        skew = skew * min(1.0, most / (skew.norm().item() + 1e-8))
    identity = torch.eye(size, device=weight.device)
    rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
    rotation = scale * rotation + (1 - scale) * identity
    if blocks.ndim == 3:
        parts = weight.reshape(-1, size, *inner)
        found = torch.einsum("knm,kn...->km...", rotation, parts).flatten(0, 1)
    else:  # BOFT rotates several times, each time with other outputs in a block.
        found = weight
        for number, each in enumerate(rotation):
            width = 2**number * (size // 2)
            found = found.reshape(-1, 2, width, *inner).transpose(1, 2).reshape(-1, size, *inner)
            found = torch.einsum("bij,bj...->bi...", each, found)
            found = found.reshape(-1, width, 2, *inner).transpose(1, 2).flatten(0, 2)
    if "rescale" in own:
        factors = own["rescale"].reshape(-1, *[1] * (weight.ndim - 1))
        found = found * (1 + scale * (factors - 1))
    return found
