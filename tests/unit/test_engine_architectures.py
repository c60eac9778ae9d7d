"""The architectures of the device benchmark have the shapes of the real models."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engine_architectures import _unet

# Numbers of parameters of the published models: SD 1.5, SD-Turbo (2.1), SDXL.
PUBLISHED = {"sd15": 859_520_964, "sd-turbo": 865_910_724, "sdxl-turbo": 2_567_463_684}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_architecture_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        unet = _unet(name)

    assert sum(parameter.numel() for parameter in unet.parameters()) == PUBLISHED[name]
