"""Encodes the rendered views once, so that training the denoiser needs no pixels.

`python -m recipe.latents` writes build/latents/latents.npy: float16,
views x styles x channels x side/8 x side/8.
"""

from __future__ import annotations

import numpy as np
import torch

from recipe import paths
from recipe.encoder import LATENT_CHANNELS, load_encoder, to_model
from recipe.looks import NAMES
from recipe.runtime import device
from recipe.views import RENDERS

LATENTS = paths.LATENTS / "latents.npy"


@torch.inference_mode()
def build() -> None:
    renders = np.load(RENDERS, mmap_mode="r")
    where = device()
    encoder = load_encoder().to(where)
    first = encoder(to_model(renders[0, :1]).to(where))
    shape = (*renders.shape[:2], *first.shape[1:])
    partial = LATENTS.with_suffix(".partial")
    out = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
    for i in range(len(renders)):
        out[i] = encoder(to_model(renders[i]).to(where)).cpu().numpy().astype(np.float16)
    out.flush()
    partial.replace(LATENTS)
    sample = np.asarray(out[:: max(1, len(out) // 50)], np.float32)
    mean, deviation = sample.mean((0, 1, 3, 4)), sample.std((0, 1, 3, 4))
    print(f"latents {shape}, channel means {mean.round(2)}, deviations {deviation.round(2)}")


def load_latents() -> np.ndarray:
    """Returns the latents in memory, because a page fault per crop costs more than the denoiser.

    Raises SystemExit if they belong to another encoder or to a different list of styles.
    """
    latents = np.load(LATENTS)
    want, got = (len(NAMES), LATENT_CHANNELS), latents.shape[1:3]
    if got != want:
        raise SystemExit(
            f"{LATENTS} has {got} looks and channels where {want} are needed: "
            "`python -m recipe.latents` creates it again"
        )
    return latents


if __name__ == "__main__":
    build()
