"""Square views of the training photos, rendered in every style.

`python -m recipe.views` writes build/latents/renders.npy: uint8, views x looks x side x side x 3.
A view is a random scale, crop and flip of one photo; the same view in all styles is one sample.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
from PIL import Image

from recipe import paths
from recipe.looks import NAMES, render
from recipe.photos import Photo, open_photo, photos

RENDERS = paths.LATENTS / "renders.npy"


def random_view(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a side x side crop, from the whole short side (scaled down) to native resolution."""
    short = min(image.shape[:2])
    largest = max(side * 1.1, min(1000, short * 1.1))
    scale = np.exp(rng.uniform(np.log(side), np.log(largest))) / short
    size = (round(image.shape[1] * scale) + 1, round(image.shape[0] * scale) + 1)
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    top = rng.integers(0, scaled.shape[0] - side + 1)
    left = rng.integers(0, scaled.shape[1] - side + 1)
    view = scaled[top : top + side, left : left + side]
    return np.ascontiguousarray(view[:, ::-1] if rng.random() < 0.5 else view)


def _render_photo(job: tuple[Photo, int, int, int]) -> np.ndarray:
    photo, side, count, seed = job
    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    image = open_photo(photo)
    views = [random_view(image, side, rng) for _ in range(count)]
    return np.stack([[render(name, view) for name in NAMES] for view in views])


def build(chosen: list[Photo], side: int, per_photo: int, workers: int) -> None:
    paths.LATENTS.mkdir(parents=True, exist_ok=True)
    jobs = [(photo, side, per_photo, 1000 + i) for i, photo in enumerate(chosen)]
    shape = (len(jobs) * per_photo, len(NAMES), side, side, 3)
    partial = RENDERS.with_suffix(".partial")
    out = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
    with ProcessPoolExecutor(workers) as pool:
        for i, block in enumerate(pool.map(_render_photo, jobs)):
            out[i * per_photo : (i + 1) * per_photo] = block
    out.flush()
    partial.replace(RENDERS)
    print(f"{shape[0]} views x {shape[1]} looks of {side} px")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--per-photo", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    build(photos("train"), args.side, args.per_photo, args.workers)
