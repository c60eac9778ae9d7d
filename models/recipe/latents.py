"""Encodes the rendered views once, so that training the denoiser never touches pixels.

`python -m recipe.latents` writes build/latents/latents.npy: float16,
views x looks x channels x side/8 x side/8.
"""

from __future__ import annotations

import numpy as np
import torch

from recipe import paths
from recipe.autoencoder import load_autoencoder, to_model
from recipe.runtime import device

LATENTS = paths.LATENTS / "latents.npy"


@torch.inference_mode()
def build() -> None:
    renders = np.load(paths.LATENTS / "renders.npy", mmap_mode="r")
    where = device()
    encoder = load_autoencoder().to(where).encoder
    first = encoder(to_model(renders[0, :1]).to(where))
    shape = (*renders.shape[:2], *first.shape[1:])
    out = np.lib.format.open_memmap(LATENTS, "w+", np.float16, shape)
    for i in range(len(renders)):
        out[i] = encoder(to_model(renders[i]).to(where)).cpu().numpy().astype(np.float16)
    out.flush()
    sample = np.asarray(out[:: max(1, len(out) // 50)], np.float32)
    mean, deviation = sample.mean((0, 1, 3, 4)), sample.std((0, 1, 3, 4))
    print(f"latents {shape}, channel means {mean.round(2)}, deviations {deviation.round(2)}")


if __name__ == "__main__":
    build()
