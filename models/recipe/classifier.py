"""A small convolutional net that names the look of a picture; trained on real renderings only.

`python -m recipe.classifier --minutes 3` learns from the training photos' renderings; the
evaluation asks it about pictures generated from photos that neither it nor the model has seen.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recipe import paths
from recipe.autoencoder import to_model
from recipe.looks import NAMES
from recipe.runtime import Clock, device, save
from recipe.views import RENDERS

CHECKPOINT = paths.CHECKPOINTS / "classifier.pt"
SIDE = 128


def new_classifier() -> nn.Sequential:
    layers: list[nn.Module] = []
    widths = (3, 24, 48, 96, 128)
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(NAMES))]
    return nn.Sequential(*layers)


def _soften(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blur and brightness of the decoder's kind, so that sharpness alone decides nothing."""
    if rng.random() < 0.5:
        images = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), "reflect"), 3, 1)
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (len(images), 1, 1, 1))).float()
    return (images * gain + 0.03 * torch.randn_like(images)).clamp(-1, 1)


def train(minutes: float, batch: int = 40) -> float:
    """Returns the share of the last batches that it named rightly."""
    renders = np.load(RENDERS, mmap_mode="r")
    rng, clock, where = np.random.default_rng(0), Clock(minutes), device()
    model = new_classifier().to(where).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    right: list[float] = []
    while not clock.over():
        labels = rng.integers(len(NAMES), size=batch)
        images = np.empty((batch, SIDE, SIDE, 3), np.uint8)
        for i, label in enumerate(labels):
            top, left = rng.integers(0, renders.shape[2] - SIDE + 1, 2)
            view = renders[rng.integers(len(renders)), label]
            images[i] = view[top : top + SIDE, left : left + SIDE]
        answers = torch.from_numpy(labels).to(where)
        got = model(_soften(to_model(images), rng).to(where))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * clock.rate()
        optimizer.zero_grad()
        nn.functional.cross_entropy(got, answers).backward()
        optimizer.step()
        right.append((got.argmax(1) == answers).float().mean().item())
    save({"model": model.state_dict()}, CHECKPOINT)
    share = float(np.mean(right[-50:]))
    print(f"look classifier: {len(right)} steps, {share:.1%} right on training renderings")
    return share


def load_classifier(path: Path = CHECKPOINT) -> nn.Module:
    model = new_classifier()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model.eval()


@torch.inference_mode()
def look_of(model: nn.Module, image: np.ndarray) -> str:
    return NAMES[int(model(to_model(image[None])).argmax())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3)
    train(parser.parse_args().minutes)
