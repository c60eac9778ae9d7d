"""Runs and checks the whole recipe at toy scale in about two minutes: `python -m recipe.smoke`.

It works in a temporary folder, on the few photos inside scikit-image and scikit-learn, and exits
nonzero when a loss does not fall, a training does not resume where it stopped, or stock diffusers
cannot load and run the export. It counts steps, so a slow machine gets the same verdict later.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # Only in the main process: the processes that render import this file, too.
    _FOLDER = tempfile.TemporaryDirectory(prefix="atelier-smoke-")
    for name in ("build", "export", "reports"):
        # These variables must be set before recipe.paths is imported.
        os.environ[f"ATELIER_{name.upper()}"] = f"{_FOLDER.name}/{name}"
    # The products are small, so two threads would be slower.
    os.environ.setdefault("ATELIER_THREADS", "1")

import numpy as np
import torch

from recipe import (
    autoencoder,
    classifier,
    encoder,
    evaluate,
    export,
    from_export,
    latents,
    pack,
    paths,
    samples,
    sheets,
    text,
    train,
    views,
)
from recipe.checkpoint import read
from recipe.gallery import Request
from recipe.generate import pipeline, restyle, square
from recipe.looks import NAMES
from recipe.photos import Photo, fetch, photos

_BEGAN = time.monotonic()
DECODER_STEPS, DENOISER_STEPS, MORE = 60, 60, 5
RATE = 0.02  # steps of the denoiser
# Most of the denoiser's loss is fine detail that is lost in the noise, so this part of the loss
# remains.
LEARNED = 0.97


def check(name: str, fine: bool) -> None:
    print(f"{'ok  ' if fine else 'FAIL'} {name} ({time.monotonic() - _BEGAN:.0f} s)", flush=True)
    if not fine:
        raise SystemExit(f"smoke run failed: {name}")


def check_resumed(path: Path, steps: int, updates: int, rate: float) -> None:
    """Checks the total number of steps, and that of the updates of AdamW."""
    state = read(path)
    muon, adam = state["optimizers"][:2]
    fine = state["step"] == steps and adam["state"][0]["step"] == updates
    fine &= muon["param_groups"][0]["full"] == rate
    check(f"{path.stem}: resumed at step {steps - MORE} with this run's rate", bool(fine))


@torch.no_grad()
def denoiser_loss(model: train.Denoiser) -> float:
    """Returns the loss on a fixed batch, because the losses of the training vary too much."""
    drawn = samples.Samples(latents.load_latents(), 99, encoder.channel_deviations())
    return float(train.loss_of(model.eval(), drawn.batch(64, 8), torch.device("cpu")))


def train_all() -> None:
    encoder.build()
    losses = autoencoder.train(0, batch=4, at_least=DECODER_STEPS)
    first, last = (np.mean(part) for part in np.array_split(losses, 4)[::3])
    check(f"decoder: loss falls, {first:.3f} -> {last:.3f}", last < 0.9 * first)
    autoencoder.train(0, batch=4, rate=0.01, at_least=MORE)
    steps = DECODER_STEPS + MORE
    check_resumed(autoencoder.CHECKPOINT, steps, steps, 0.01)
    latents.build()
    text.train_tokenizer(captions=5000)
    before = denoiser_loss(train.Denoiser())
    train.train(0, batch=8, side=8, rate=RATE, decay=0.95, at_least=DENOISER_STEPS)
    after = denoiser_loss(export.trained_denoiser())
    check(f"denoiser: loss falls, {before:.3f} -> {after:.3f}", after < LEARNED * before)
    train.train(0, batch=4, side=8, rate=0.01, at_least=MORE)
    steps = DENOISER_STEPS + MORE
    check_resumed(train.CHECKPOINT, steps, steps, 0.01)
    train.train(0)
    check("denoiser: no minutes left, no step", read(train.CHECKPOINT)["step"] == steps)


def travel() -> None:
    """Moves weights to another machine, without the state of the optimizers."""
    pieces = pack.pack(paths.BUILD / "pieces", with_photos=False)
    largest = max(piece.stat().st_size for piece in pieces)
    check(f"weights: {len(pieces)} pieces of at most 16 MB", largest <= 16e6)
    pack.unpack(pieces[0].parent)
    train.train(0, batch=4, side=8, rate=0.01, at_least=MORE)
    check_resumed(train.CHECKPOINT, DENOISER_STEPS + 2 * MORE, MORE, 0.01)


def _weights() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in paths.EXPORT.rglob("*.safetensors")}


def export_and_return() -> None:
    """Resumes a training from the export, and exports again."""
    export.export()
    check("export: holds the last checkpoint", not export.is_newer())
    shipped, vocab = _weights(), (paths.TEXT / "vocab.json").read_bytes()
    paths.CHECKPOINTS.rename(paths.BUILD / "before")
    paths.TEXT.rename(paths.BUILD / "text-before")
    from_export.lay_down_export()
    check("from export: the same words", vocab == (paths.TEXT / "vocab.json").read_bytes())
    export.export()
    check("from export: exports the same weights", _weights() == shipped)
    train.train(0, batch=4, side=8, rate=0.01, at_least=1)
    check("from export: resumes, and is newer than the export", export.is_newer())


def draw(photo: Photo) -> None:
    check("export: stock diffusers loads it", pipeline() is not None)
    image = square(photo, 128)
    for size in ((128, 128), (264, 520)):
        start = np.asarray(np.resize(image, (*size, 3)))
        first, again = (restyle(start, "oil painting", seed=3) for _ in range(2))
        check(f"export: a {size[1]}x{size[0]} image", first.shape == start.shape)
        check("export: the same seed gives the same image", np.array_equal(first, again))
    check("export: strength 0 is encode and decode", restyle(image, "", strength=0).shape[2] == 3)
    check("classifier: learns", classifier.train(every=1) > 0.5)
    wanted = [Request(photo, name, seed=1, side=256) for name in NAMES]
    measured = evaluate.adherence(wanted)
    check("evaluation: measures an image of every look", measured["images"] == len(NAMES))
    sheets.looks_sheets(wanted)
    check("evaluation: draws two sheets", len(list(paths.REPORTS.glob("looks-*.png"))) == 2)


def run() -> None:
    torch.manual_seed(0)
    chosen = [photo for photo in photos() if photo.kind == "pypi"]
    fetch(chosen)
    views.build(chosen, side=256, per_photo=1, workers=2)
    train_all()
    travel()
    export_and_return()
    draw(chosen[0])
    print("smoke run passed: 1 passed, 0 failed")


if __name__ == "__main__":
    run()
