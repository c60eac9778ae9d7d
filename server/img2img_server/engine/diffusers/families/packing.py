"""Packs latents into tokens of 2 x 2, the input of FLUX.1, Qwen-Image and related models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Packs latents, n x c x h x w, into tokens, n x (h / 2 * w / 2) x 4 c."""
    count, channels, height, width = latents.shape
    packed = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return packed.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpacks tokens into latents, n x c x h x w.

    Args:
        height, width: In tokens.
    """
    patches = tokens.reshape(len(tokens), height, width, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
