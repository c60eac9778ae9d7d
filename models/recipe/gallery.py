"""Generates many images in parallel, with one thread for each process.

They are stored in build/gallery/<hash of the exported model>, so that images of an old model are
never used.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipe import paths
from recipe.generate import restyle, square, subject
from recipe.photos import Photo

GALLERY = paths.BUILD / "gallery"


@cache
def _folder() -> Path:
    digest = sha256()
    for file in sorted([*paths.EXPORT.rglob("*.safetensors"), *paths.EXPORT.rglob("*.json")]):
        digest.update(file.read_bytes())
    digest.update((paths.EXPORT / "img2img.toml").read_bytes())
    return GALLERY / digest.hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """One square image to generate; `strength` None is the model's default."""

    photo: Photo
    look: str
    seed: int
    strength: float | None = None
    side: int = 512

    @property
    def path(self) -> Path:
        strength = "default" if self.strength is None else f"{self.strength:.1f}"
        name = (
            f"{self.photo.id}.{self.look.replace(' ', '-')}.{strength}.{self.side}.{self.seed}.png"
        )
        return _folder() / name

    @property
    def prompt(self) -> str:
        return f"{subject(self.photo)}, {self.look}"


def _one_thread() -> None:
    torch.set_num_threads(1)


def _make(request: Request) -> None:
    if not request.path.exists():
        image = square(request.photo, request.side)
        got = restyle(image, request.prompt, request.seed, request.strength)
        partial = request.path.with_suffix(".partial")
        Image.fromarray(got).save(partial, "PNG")
        partial.replace(request.path)


def make(requests: list[Request], workers: int = 2) -> None:
    """Generates the missing images. Deletes images of other models."""
    _folder().mkdir(parents=True, exist_ok=True)
    for other in GALLERY.iterdir():
        if other != _folder():
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    missing = [request for request in requests if not request.path.exists()]
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        for number, _ in enumerate(pool.map(_make, missing, chunksize=4), start=1):
            if number % 40 == 0:
                print(f"{number} of {len(missing)} images", flush=True)


def image(request: Request) -> np.ndarray:
    """Returns the image (uint8), which `make` has generated before."""
    return np.asarray(Image.open(request.path))
