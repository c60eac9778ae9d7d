"""The whole recipe at toy scale in about two minutes, checking itself: `python -m recipe.smoke`.

It works in a temporary folder, on the few photos inside scikit-image and scikit-learn, and exits
nonzero when a loss does not fall or stock diffusers cannot load and run the export.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

_FOLDER = tempfile.TemporaryDirectory(prefix="atelier-smoke-")
os.environ["ATELIER_BUILD"] = f"{_FOLDER.name}/build"  # before recipe.paths is read
os.environ["ATELIER_EXPORT"] = f"{_FOLDER.name}/atelier"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from recipe import autoencoder, classifier, export, latents, pack, samples, text, train, views  # noqa: E402
from recipe.photos import fetch, photos  # noqa: E402
from recipe.pictures import pipeline, restyle, square  # noqa: E402

_BEGAN = time.monotonic()
LEARNED = 0.96  # most of the denoiser's loss is fine detail that noise has taken, and stays
MINUTES = float(os.environ.get("ATELIER_SMOKE_MINUTES", "0.1"))  # for each of two trainings


def check(name: str, fine: bool) -> None:
    print(f"{'ok  ' if fine else 'FAIL'} {name} ({time.monotonic() - _BEGAN:.0f} s)", flush=True)
    if not fine:
        raise SystemExit(f"smoke run failed: {name}")


def falls(losses: list[float]) -> bool:
    """The last quarter is clearly below the first."""
    quarter = max(1, len(losses) // 4)
    first, last = np.mean(losses[:quarter]), np.mean(losses[-quarter:])
    print(f"     loss {first:.3f} -> {last:.3f}")
    return bool(last < 0.9 * first)


@torch.no_grad()
def denoiser_loss(model: train.Denoiser) -> float:
    """On one batch that is the same every time; the training's own losses vary too much."""
    data = samples.Samples(np.load(latents.LATENTS), 99, autoencoder.channel_deviations()).batch(
        64, 8
    )
    return float(train.loss_of(model.eval(), data, torch.device("cpu")))


def _size(path: Path) -> int:
    return path.stat().st_size


def run() -> None:
    torch.manual_seed(0)
    chosen = [photo for photo in photos() if photo.kind == "pypi"]
    fetch(chosen)
    views.build(chosen, side=256, per_photo=1, workers=2)
    losses = autoencoder.train(MINUTES, batch=4, side=64, at_least=60)
    check(f"autoencoder: loss falls in {len(losses)} steps", falls(losses))
    latents.build()
    text.train_tokenizer(captions=5000)
    untrained = denoiser_loss(train.Denoiser())
    losses = train.train(MINUTES, batch=4, side=8, rate=0.02, decay=0.95, at_least=120)
    trained = denoiser_loss(export.trained_denoiser())
    print(f"     loss {untrained:.3f} -> {trained:.3f}")
    check(f"denoiser: loss falls in {len(losses)} steps", trained < LEARNED * untrained)
    pieces = pack.pack(Path(_FOLDER.name) / "pieces", with_photos=False)
    check(f"weights: {len(pieces)} pieces of at most 16 MB", max(map(_size, pieces)) <= 16e6)
    pack.unpack(pieces[0].parent)
    more = train.train(0, batch=4, side=8, decay=0.99, at_least=10)
    check(f"denoiser: {len(more)} more steps from those weights", len(more) == 10)
    check("classifier: learns", classifier.train(every=1) > 0.5)
    export.export()
    check("export: stock diffusers loads it", pipeline() is not None)
    image = square(chosen[0], 128)
    for size in ((128, 128), (264, 520)):
        picture = np.asarray(np.resize(image, (*size, 3)))
        first, again = (restyle(picture, "oil painting", seed=3) for _ in range(2))
        check(f"export: a {size[1]}x{size[0]} picture", first.shape == picture.shape)
        check("export: the same seed gives the same picture", np.array_equal(first, again))
    check("export: strength 0 is encode and decode", restyle(image, "", strength=0).shape[2] == 3)
    print("smoke run passed: 1 passed, 0 failed")


if __name__ == "__main__":
    run()
