"""In bfloat16, the default on a GPU, our images deviate no more than the stock pipeline's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import families as served
from img2img_server.imaging.base import Pixels
from tests.engine_bench import Stock, blocks, images, job, run, running
from tests.oracle.harness import families

SCHEDULERS = {family.name: family.default_scheduler for family in served()}


def deviation(found: Pixels, expected: Pixels) -> float:
    """Returns the mean difference of a value, of 255."""
    return float(np.abs(found.astype(int) - expected.astype(int)).mean())


@pytest.mark.parametrize("family", families())
def test_an_image_in_bfloat16_is_as_close_as_the_stock_pipelines(
    family: str, tmp_path: Path
) -> None:
    model = next(iter(families()[family].values()))
    folder = model.write(tmp_path)
    wanted = job(
        scheduler=(*model.schedulers, SCHEDULERS[family])[0],
        guidance_scale=model.guidance_scales[1],
        negative_prompt="fog",
        strength=1.0,
        num_inference_steps=5,
        init_image=blocks(*model.sizes[0]),
    )
    (exact,) = Stock(folder, model.call).images(wanted)
    (theirs,) = Stock(folder, model.call, torch.bfloat16).images(wanted)
    denoiser = DiffusersDenoiser.load(str(folder), torch.device("cpu"), torch.bfloat16)
    with running(denoiser) as engine:
        (ours,) = images(run(engine, wanted))

    assert deviation(ours, exact) <= 1.5 * deviation(theirs, exact) + 0.5
