"""Names the style of an image. It is trained on renderings of the training photos only.

`python -m recipe.classifier` trains it; the evaluation uses it on images generated from photos that
neither it nor the model has seen. Half of its examples are softened and grainy, so that it does not
take the softness of the autoencoder for a style.
"""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
from sklearn.ensemble import ExtraTreesClassifier

from recipe import paths
from recipe.features import features
from recipe.looks import NAMES
from recipe.views import RENDERS

CHECKPOINT = paths.CHECKPOINTS / "classifier.pickle"


def _softened(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.4)).astype(np.float32)
    grain = cv2.resize(
        rng.normal(0, 1, (image.shape[0] // 3, image.shape[1] // 3, 3)),
        None,
        fx=3,
        fy=3,
        interpolation=cv2.INTER_LINEAR,
    )
    grain = cv2.resize(grain, image.shape[1::-1])
    return np.clip(soft + rng.uniform(0, 9) * grain, 0, 255).astype(np.uint8)


def _describe(view: int) -> np.ndarray:
    """Returns the features of every style of one view, unchanged and softened: styles x 2 x
    features.
    """
    cv2.setNumThreads(1)
    renders = np.load(RENDERS, mmap_mode="r")
    rng = np.random.default_rng(view)
    return np.array(
        [[features(image), features(_softened(image, rng))] for image in np.array(renders[view])]
    )


def train(every: int = 4, workers: int = 2) -> float:
    """Trains on every n-th view; returns the share of styles named correctly in other views."""
    views = range(0, len(np.load(RENDERS, mmap_mode="r")), every)
    with ProcessPoolExecutor(workers) as pool:
        table = np.stack(list(pool.map(_describe, views, chunksize=4)))
    labels = np.broadcast_to(np.arange(len(NAMES))[None, :, None], table.shape[:3])
    last = max(1, len(table) // 6)  # The photos at the end are the test set.

    def flat(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return table[rows].reshape(-1, table.shape[-1]), labels[rows].reshape(-1)

    model = ExtraTreesClassifier(300, min_samples_leaf=2, n_jobs=workers, random_state=0)
    model.fit(*flat(slice(0, -last)))
    share = float(model.score(*flat(slice(-last, None))))
    model.fit(*flat(slice(None)))
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    CHECKPOINT.write_bytes(pickle.dumps(model))
    print(f"look classifier: {share:.1%} right on renderings of photos it had not seen")
    return share


def load_classifier() -> ExtraTreesClassifier:
    """Returns the classifier from the pickle that `train` wrote on this machine."""
    return pickle.loads(CHECKPOINT.read_bytes())


def look_of(model: ExtraTreesClassifier, image: np.ndarray) -> str:
    return NAMES[int(model.predict(features(image)[None])[0])]


if __name__ == "__main__":
    train()
