"""Previews: a linear map from latents to colours, fitted to the autoencoder of the model.

A tiny autoencoder makes better previews; this module only scales them down.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

MAX_SIDE = 256
_FIT_IMAGES, _FIT_SIDE = 8, 96


def fit_projection(encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Fits a least-squares map from latents to the mean colour of the pixels of each latent.

    Args:
        encode: images n x 3 x h x w in -1..1 to latents n x c x h/8 x w/8, float32 on the CPU.

    Returns:
        (c + 1) x 3; the last line is the offset.
    """
    generator = torch.Generator().manual_seed(0)
    # Smooth fields of colour with some texture, as in photos and paintings.
    coarse = torch.rand((_FIT_IMAGES, 3, 5, 5), generator=generator) * 2 - 1
    fine = torch.rand((_FIT_IMAGES, 3, 24, 24), generator=generator) * 2 - 1
    size = (_FIT_SIDE, _FIT_SIDE)
    images = functional.interpolate(coarse, size, mode="bicubic", align_corners=False)
    images += 0.3 * functional.interpolate(fine, size, mode="bilinear", align_corners=False)
    images = images.clamp(-1, 1)
    latents = encode(images)
    colours = functional.adaptive_avg_pool2d(images, (latents.shape[2], latents.shape[3]))
    known = _with_offset(latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]))
    wanted = colours.permute(0, 2, 3, 1).reshape(-1, 3)
    # A ridge penalty limits the weights of latents that hardly depend on the colour.
    ridge = 1e-3 * len(known) * torch.eye(known.shape[1])
    projection: Tensor = torch.linalg.solve(known.T @ known + ridge, known.T @ wanted)
    return projection


def project(latents: Tensor, projection: Tensor, side_scale: int = 8) -> Tensor:
    """Returns rough images: uint8, n x height x width x 3, the longer side at most 256.

    Args:
        side_scale: Pixels of the image's side per latent.
    """
    colours = _with_offset(latents.permute(0, 2, 3, 1)) @ projection
    colours = colours.permute(0, 3, 1, 2)
    height, width = colours.shape[2:]
    scale = min(float(side_scale), MAX_SIDE / max(height, width))
    size = (max(1, int(height * scale)), max(1, int(width * scale)))
    colours = functional.interpolate(colours, size, mode="bilinear", align_corners=False)
    pixels = (colours.clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1)


def shrink(images: Tensor) -> Tensor:
    """Makes images n x 3 x h x w smaller, to at most 256 pixels on the longer side."""
    height, width = images.shape[2:]
    scale = min(1.0, MAX_SIDE / max(height, width))
    size = (max(1, int(height * scale)), max(1, int(width * scale)))
    return functional.interpolate(images, size, mode="area")


def _with_offset(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
