"""Previews by a linear projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from img2img_server.engine.preview import fit_projection, project

MIX = torch.tensor([[1.0, 0.2, -0.4], [0.3, -1.0, 0.5], [0.1, 0.6, 0.9], [-0.5, 0.4, 0.2]])


def encode(images: Tensor) -> Tensor:
    """Stands for an autoencoder: returns the mean colours of 8 x 8 pixels, mixed over the
    channels.
    """
    return torch.einsum("nchw,kc->nkhw", functional.avg_pool2d(images, 8), MIX) + 0.25


def test_the_projection_gives_the_colours_back() -> None:
    projection = fit_projection(encode)
    colours = torch.tensor([[-0.8, 0.0, 0.6], [0.5, 0.9, -0.3]])
    images = colours.reshape(2, 3, 1, 1).expand(2, 3, 64, 64)

    pixels = project(encode(images), projection).float() / 127.5 - 1
    torch.testing.assert_close(pixels.mean(dim=(1, 2)), colours, atol=0.03, rtol=0.0)


@pytest.mark.parametrize(
    ("latent", "size"),
    [((8, 9), (64, 72)), ((64, 64), (256, 256)), ((128, 96), (256, 192)), ((33, 65), (129, 256))],
)
def test_the_longer_side_is_at_most_256(latent: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = project(torch.zeros(1, 4, *latent), torch.zeros(5, 3))

    assert pixels.shape == (1, *size, 3)
    assert pixels.dtype == torch.uint8
