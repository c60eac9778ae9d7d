"""The architectures of the device benchmark have the shapes of the real models."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engine_architectures import _unet
from benchmarks.engine_transformers import network

# Numbers of parameters of the published models: SD 1.5, SD-Turbo (2.1), SDXL.
PUBLISHED = {"sd15": 859_520_964, "sd-turbo": 865_910_724, "sdxl-turbo": 2_567_463_684}
# FLUX.1 dev has 11,901,408,320 with the two layers that read the guidance scale. The file of SD3.5
# Medium has 4.94 GB with the grid of positions, 384 x 384 x 1536 numbers; that of Z-Image 12.31 GB.
TRANSFORMERS = {
    "flux-schnell": 11_891_178_560,
    "sd35-medium": 2_243_171_520,
    "z-image-turbo": 6_154_908_736,
}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_architecture_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        assert parameters(_unet(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        assert parameters(network(name)) == TRANSFORMERS[name]
