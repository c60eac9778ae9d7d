"""Families without a stock image-to-image pipeline: a strength near 0 hardly changes the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from img2img_server.engine.diffusers.families import families as served
from tests.engine_bench import Stock, blocks, images, job, load, run, running
from tests.oracle.harness import families

FAMILIES = {
    family.name: family
    for family in served()
    if not any("Img2Img" in name for name in family.pipelines.values())
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_strength_near_zero_is_the_autoencoders_round_trip(family: str, tmp_path: Path) -> None:
    model = next(iter(families()[family].values()))
    folder = model.write(tmp_path)
    wanted = job(
        scheduler=FAMILIES[family].default_scheduler,
        strength=0.001,
        num_inference_steps=1000,
        init_image=blocks(*model.sizes[0]),
    )
    with running(load(folder)) as engine:
        (found,) = images(run(engine, wanted))

    vae = Stock(folder)._pipeline.vae
    pixels = torch.from_numpy(wanted.init_image).permute(2, 0, 1)[None].float() / 127.5 - 1
    (seed,) = wanted.seeds
    codec = FAMILIES[family].codec(vae, tile_pixels=2**20)
    encoded = codec.run_encode(pixels).latent_dist
    frames = pixels.unsqueeze(2) if "z_dim" in vae.config else pixels
    whole = vae.decode(vae.encode(frames).latent_dist.mean).sample
    torch.testing.assert_close(codec.run_decode(encoded.mean), whole.reshape(pixels.shape))
    spread = randn_tensor(encoded.mean.shape, generator=torch.Generator().manual_seed(seed))
    decoded = codec.run_decode(encoded.mean + encoded.std * spread)
    expected = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    # The noise that is added, 0.006, changes the image by about 1.
    assert np.abs(found - expected).mean() < 2.0
    assert expected.std() > 20, "it shows something"
