"""Random crops that train the autoencoder: sharp photos, and views in every style."""

from __future__ import annotations

import numpy as np
from PIL import Image

from recipe.photos import Photo, open_photo, photos
from recipe.views import RENDERS

SHORT_SIDES = (512, 704)  # pixels; near the native size, where photos have the most detail
PHOTOS = 0.6  # share of crops from photos without a style
# The crops are in memory: a page fault per crop would take longer than the training step.
VIEWS = 160


def _scaled(photo: Photo) -> list[np.ndarray]:
    image = Image.fromarray(open_photo(photo))
    short = min(image.size)
    return [
        np.asarray(
            image.resize(
                (image.width * side // short, image.height * side // short),
                Image.Resampling.LANCZOS,
            )
        )
        for side in SHORT_SIDES
        if short >= 0.9 * side
    ]


class Crops:
    """Random crops. `views`: uint8, views x styles x side x side x 3."""

    def __init__(self, seed: int) -> None:
        renders = np.load(RENDERS, mmap_mode="r")
        self.views = np.array(renders[:: -(-len(renders) // VIEWS)])
        known = [photo for photo in photos("train") if photo.path.exists()]
        self._photos = [image for photo in known for image in _scaled(photo)]
        self._rng = np.random.default_rng(seed)

    def _source(self) -> np.ndarray:
        rng = self._rng
        if self._photos and rng.random() < PHOTOS:
            return self._photos[rng.integers(len(self._photos))]
        return self.views[rng.integers(len(self.views)), rng.integers(self.views.shape[1])]

    def draw(self, count: int, side: int) -> np.ndarray:
        """Returns crops: uint8, count x side x side x 3. Half of them are mirrored."""
        out = np.empty((count, side, side, 3), np.uint8)
        for crop in out:
            source = self._source()
            top = self._rng.integers(0, source.shape[0] - side + 1)
            left = self._rng.integers(0, source.shape[1] - side + 1)
            cut = source[top : top + side, left : left + side]
            crop[:] = cut[:, ::-1] if self._rng.random() < 0.5 else cut
        return out
