"""The photographs: `data/sources.csv` lists the source, author and licence of each.

`python -m recipe.photos` fetches the Debian packages that hold most of them (`apt-get download`;
the rest is inside scikit-image and scikit-learn, which requirements.txt pins) and lays every
photo down as build/photos/<split>/<id>.png.
"""

from __future__ import annotations

import csv
import io
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from recipe import paths
from recipe.rcc import read_rcc

LONGEST_SIDE = 1600  # pixels; a model for 512-pixel images learns nothing from larger photos


@dataclass(frozen=True)
class Photo:
    """One row of sources.csv; `member` is a path in the package, with `!` a path in an .rcc."""

    id: str
    split: str
    kind: str
    package: str
    member: str
    author: str
    licence: str
    source: str
    sha256: str  # SHA-256 of the file in the package

    @property
    def path(self) -> Path:
        return paths.PHOTOS / self.split / f"{self.id}.png"


def photos(split: str | None = None) -> list[Photo]:
    with paths.SOURCES.open(newline="", encoding="utf-8") as file:
        rows = [Photo(**row) for row in csv.DictReader(file)]
    return [row for row in rows if split in (None, row.split)]


def open_photo(photo: Photo) -> np.ndarray:
    """Returns RGB, uint8, height x width x 3."""
    return np.asarray(Image.open(photo.path).convert("RGB"))


@cache
def _unpacked_deb(package: str) -> Path:
    target = paths.DOWNLOADS / package
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=paths.DOWNLOADS) as fresh:
            subprocess.run(["apt-get", "download", "-q", package], cwd=fresh, check=True)
            (deb,) = Path(fresh).glob("*.deb")
            subprocess.run(["dpkg", "-x", str(deb), f"{fresh}/files"], check=True)
            Path(fresh, "files").rename(target)
    return target


_bundle = cache(read_rcc)


def _read(photo: Photo) -> bytes:
    if photo.kind == "pypi":
        module, _, member = photo.member.partition("/")
        return (files(module) / member).read_bytes()
    file, _, inner = photo.member.partition("!")
    path = _unpacked_deb(photo.package) / file
    return _bundle(path)[inner] if inner else path.read_bytes()


def _checked(photo: Photo) -> bytes:
    data = _read(photo)
    found = sha256(data).hexdigest()
    if found != photo.sha256:
        raise SystemExit(
            f"{photo.id}: {photo.member} of {photo.package} is not the file that data/sources.csv "
            f"names (sha256 {found}). Check the file and its licence, then update data/sources.csv."
        )
    return data


def fetch(chosen: list[Photo]) -> None:
    paths.DOWNLOADS.mkdir(parents=True, exist_ok=True)
    for photo in chosen:
        if photo.path.exists():
            continue
        photo.path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(_checked(photo))).convert("RGB")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        partial = photo.path.with_suffix(".partial")
        image.save(partial, "PNG")
        partial.replace(photo.path)


if __name__ == "__main__":
    fetch(photos())
    print(f"{len(photos('train'))} photos to train on, {len(photos('test'))} held out")
