"""Trains the decoder on photos and rendered views. The encoder is not trained, but computed
(`encoder.py`).

`python -m recipe.autoencoder --minutes 30` starts, or resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn import functional

from recipe import paths
from recipe.checkpoint import Checkpoint, averaged
from recipe.crops import Crops
from recipe.encoder import (
    WIDTH,
    encoder_state,
    load_encoder,
    new_autoencoder,
    to_images,
    to_model,
)
from recipe.muon import optimizers, set_rate
from recipe.runtime import Clock, device, follow

# standard deviation of the noise on latents: the denoiser's latents are never exact, so the decoder
# is trained with noise
NOISE = 0.1
HINTS = 0.3  # weight of the loss at the inner resolutions
CHECKPOINT = paths.CHECKPOINTS / "decoder.pt"


def load_autoencoder() -> AutoencoderTiny:
    """Returns the autoencoder with the running average of the decoder's weights."""
    model = new_autoencoder()
    model.encoder.load_state_dict(encoder_state())
    model.decoder.load_state_dict(averaged(CHECKPOINT))
    return model.eval().requires_grad_(False)


def reconstruction_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Returns the mean of the root mean square errors of the crops."""
    return ((got - want).square().mean(dim=(1, 2, 3)) + 1e-4).sqrt().mean()


class Hints(nn.Module):
    """Makes the decoder's inner resolutions predict the image too, each by a linear map.

    Upsampling repeats pixels, and the four copies are hard to distinguish for a decoder. With a
    loss at 1/4 and 1/2 of the resolution it learns several times faster. Used in training only.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        layers = list(decoder.layers)
        ups = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
        self._folds = (4, 2)
        self.heads = nn.ModuleList(nn.Conv2d(WIDTH, 3 * fold**2, 1) for fold in self._folds)
        self._seen: list[torch.Tensor] = []
        for place in ups[1:]:
            layers[place].register_forward_pre_hook(
                lambda _, given: self._seen.append(given[0]) if torch.is_grad_enabled() else None
            )

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the loss of the decoder's last pass, whose target is `images`."""
        losses = [
            reconstruction_loss(head(seen), functional.pixel_unshuffle(images, fold))
            for head, seen, fold in zip(self.heads, self._seen, self._folds, strict=True)
        ]
        self._seen.clear()
        return torch.stack(losses).sum()


@torch.no_grad()
def psnr(encoder: nn.Module, decoder: nn.Module, images: torch.Tensor) -> float:
    """Returns the mean PSNR of the images in dB, with pixels rounded and clamped as when saved."""
    got = to_images(decoder(encoder(images))).astype(np.float32)
    want = to_images(images).astype(np.float32)
    return float((10 * np.log10(255**2 / ((got - want) ** 2).mean((1, 2, 3)))).mean())


def train(
    minutes: float,
    batch: int = 8,
    side: int = 64,
    rate: float = 0.015,
    at_least: int = 0,
) -> list[float]:
    """Returns the loss of every step of this run, which has at least so many steps."""
    where = device()
    encoder = load_encoder().to(where)
    decoder = new_autoencoder().decoder.to(where).train()
    average = copy.deepcopy(decoder).requires_grad_(False)
    hints = Hints(decoder).to(where)
    chosen = optimizers(decoder, rate, adam_rate=0.06 * rate)
    every = [*chosen, torch.optim.Adam(hints.parameters(), 2e-3)]
    kept = Checkpoint(CHECKPOINT, {"model": decoder, "average": average, "hints": hints}, every)
    clock = Clock(minutes, kept.spent, at_least)
    losses: list[float] = []
    if clock.done == 1:
        return losses
    crops = Crops(seed=kept.step)
    held_back = to_model(crops.views[::16, 0]).to(where)
    while clock.tick():
        images = to_model(crops.draw(batch, side)).to(where)
        latents = encoder(images)
        level = NOISE * torch.rand(len(images), 1, 1, 1, device=where)
        loss = reconstruction_loss(decoder(latents + level * torch.randn_like(latents)), images)
        (loss + HINTS * (1 - clock.done) * hints.loss(images)).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        set_rate(chosen, clock.rate(warmup=0.03))
        for optimizer in every:
            optimizer.step()
            optimizer.zero_grad()
        follow(average, decoder, kept.step, 0.998)
        losses.append(loss.item())
        kept.stepped(clock)
        if kept.step % 500 == 0:
            mean = np.mean(losses[-500:])
            quality = psnr(encoder, average, held_back)
            print(f"{kept.step} {clock} loss {mean:.4f} photos {quality:.1f} dB", flush=True)
    kept.keep(clock)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=40,
        help="minutes of training in total, including resumed runs",
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.015)
    train(**vars(parser.parse_args()))
