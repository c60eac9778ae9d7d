"""Trains the denoiser and the text encoder together.

`python -m recipe.train --minutes 95` starts, or resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import time

import numpy as np
import torch
from torch import nn

from recipe import paths
from recipe.checkpoint import Checkpoint
from recipe.encoder import channel_deviations
from recipe.latents import load_latents
from recipe.muon import optimizers, set_rate
from recipe.runtime import Clock, Threads, device, follow
from recipe.samples import Batch, Samples
from recipe.text import load_tokenizer, new_text_encoder, token_ids
from recipe.unet import new_unet

CHECKPOINT = paths.CHECKPOINTS / "denoiser.pt"


class Denoiser(nn.Module):
    """Text encoder and UNet as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer()
        self.text = new_text_encoder(self.tokenizer)
        self.unet = new_unet()

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.text(input_ids=ids).last_hidden_state
        return self.unet(noisy, timesteps, encoder_hidden_states=hidden).sample


def loss_of(model: Denoiser, data: Batch, where: torch.device) -> torch.Tensor:
    """Returns the weighted mean squared error of v."""
    ids = token_ids(model.tokenizer, data.captions)
    noisy = data.noisy.to(where, memory_format=torch.channels_last)
    got = model(noisy, data.timesteps.to(where), ids.to(where))
    return ((got - data.target.to(where)).square() * data.weight.to(where)).mean()


def train(
    minutes: float,
    batch: int = 32,
    side: int = 16,
    rate: float = 0.012,
    decay: float = 0.999,
    at_least: int = 0,
) -> list[float]:
    """Returns the loss of every step of this run, which has at least so many steps."""
    where = device()
    model = Denoiser().to(where).train()
    model.unet.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    chosen = optimizers(model, rate, adam_rate=0.05 * rate, rim=("embed", "conv_in", "conv_out"))
    kept = Checkpoint(CHECKPOINT, {"model": model, "average": average}, chosen)
    clock, losses = Clock(minutes, kept.spent, at_least), []
    if clock.done == 1:
        return losses
    samples = Samples(load_latents(), kept.step, channel_deviations())
    threads = Threads()
    while clock.tick():
        began = time.monotonic()
        set_rate(chosen, clock.rate())
        large = kept.step % 2 == 1  # This applies to every second batch: fewer and larger crops.
        data = samples.batch(max(1, batch // 4) if large else batch, 2 * side if large else side)
        loss = loss_of(model, data, where)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        follow(average, model, kept.step, decay)
        losses.append(loss.item())
        kept.stepped(clock)
        threads.stepped(kept.step, time.monotonic() - began)
        if kept.step % 100 == 0:
            print(f"{kept.step} {clock} loss {np.mean(losses[-100:]):.4f}", flush=True)
    kept.keep(clock)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=95,
        help="minutes of training in total, including resumed runs",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=16, help="side of the crops, in latents")
    parser.add_argument("--rate", type=float, default=0.012)
    parser.add_argument("--decay", type=float, default=0.999)
    train(**vars(parser.parse_args()))
