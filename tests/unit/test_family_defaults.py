"""Defaults and refusals of the model families, from the JSON files of a model alone."""

from __future__ import annotations

from typing import Any

import pytest

from img2img_server.domain.models import Guidance
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.family import ModelError, ModelFiles, ModelTraits


def traits(class_name: str, **configs: dict[str, Any]) -> ModelTraits:
    files = ModelFiles({"_class_name": class_name}, configs)
    return detect(files, "the model").traits(files)


FLUX = {"in_channels": 64, "out_channels": None}


def test_flux_dev_takes_the_guidance_scale_as_an_input() -> None:
    found = traits("FluxPipeline", transformer={**FLUX, "guidance_embeds": True})

    assert (found.family, found.guidance) == ("flux", Guidance.EMBEDDED)
    assert (found.num_inference_steps, found.guidance_scale) == (28, 3.5)
    assert (found.native_size, found.side_multiple) == (1024, 16)


def test_flux_schnell_runs_four_steps_without_guidance() -> None:
    found = traits("FluxPipeline", transformer={**FLUX, "guidance_embeds": False})

    assert (found.guidance, found.num_inference_steps) == (Guidance.NONE, 4)


def test_a_flux_model_with_a_control_image_is_refused() -> None:
    config = {"in_channels": 384, "out_channels": 64, "guidance_embeds": True}
    with pytest.raises(ModelError, match="384 input channels instead of 64"):
        traits("FluxPipeline", transformer=config)
