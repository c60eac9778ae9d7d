"""The autoencoder: diffusers' AutoencoderTiny, 8x smaller in each direction, 16 channels.

`python -m recipe.autoencoder --minutes 30` trains it on photos and rendered views;
`--resume --decoder-only` goes on with the decoder while the latents stay what they are.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn

from recipe import paths
from recipe.crops import Crops
from recipe.runtime import Clock, device, follow, save

WIDTH, LATENT_CHANNELS = 32, 16
ENCODER_BLOCKS, DECODER_BLOCKS = (0, 1, 2, 3), (3, 2, 2, 0)
NOISE = 0.1  # deviation; the denoiser's latents are never exact, and the decoder learns that
CHECKPOINT = paths.CHECKPOINTS / "autoencoder.pt"


def new_autoencoder() -> AutoencoderTiny:
    model = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=ENCODER_BLOCKS,
        num_decoder_blocks=DECODER_BLOCKS,
        scaling_factor=1.0,
        force_upcast=False,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last_of_branch = name.endswith("conv.4")  # AutoencoderTinyBlock: conv, relu, x3
            nn.init.orthogonal_(module.weight, gain=0.2 if last_of_branch else 1.2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)


def load_autoencoder(path: Path = CHECKPOINT) -> AutoencoderTiny:
    model = new_autoencoder()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    return model.eval().requires_grad_(False)


def to_model(images: np.ndarray) -> torch.Tensor:
    """uint8 N x H x W x 3 -> float N x 3 x H x W in -1..1."""
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    return (tensor / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_images(tensor: torch.Tensor) -> np.ndarray:
    """float N x 3 x H x W in -1..1 -> uint8 N x H x W x 3."""
    pixels = (tensor.clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def reconstruction_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Root mean square error of each crop: between the mean error and the mean of the decibels."""
    return ((got - want).square().mean(dim=(1, 2, 3)) + 1e-4).sqrt().mean()


def unit_latents_loss(latents: torch.Tensor) -> torch.Tensor:
    """Pulls every channel to mean 0 and deviation 1, what the denoiser expects."""
    mean, variance = latents.mean(dim=(0, 2, 3)), latents.var(dim=(0, 2, 3))
    return mean.square().mean() + (variance + 1e-4).log().square().mean()


@torch.no_grad()
def psnr(model: AutoencoderTiny, images: torch.Tensor) -> float:
    """Mean over the pictures, in dB, of pixels rounded and clamped as they would be saved."""
    got = to_images(model.decoder(model.encoder(images))).astype(np.float32)
    want = to_images(images).astype(np.float32)
    return float((10 * np.log10(255**2 / ((got - want) ** 2).mean((1, 2, 3)))).mean())


def train(
    minutes: float,
    batch: int = 8,
    side: int = 64,
    rate: float = 1.2e-3,
    resume: bool = False,
    decoder_only: bool = False,
    at_least: int = 0,
) -> list[float]:
    """Returns the loss of every step; goes on past the time until `at_least` steps are done.

    What is saved is the running average of the weights.
    """
    where = device()
    crops = Crops(seed=int(time.time()) if resume else 0)
    model = (load_autoencoder() if resume else new_autoencoder()).to(where).train()
    average = copy.deepcopy(model).requires_grad_(False)
    trained = model.decoder if decoder_only else model
    trained.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), rate, (0.9, 0.98), weight_decay=0)
    held_back = to_model(crops.views[::16, 0]).to(where)
    clock = Clock(minutes, at_least=at_least)
    losses: list[float] = []
    while clock.tick():
        images = to_model(crops.draw(batch, side)).to(where)
        with torch.set_grad_enabled(not decoder_only):
            latents = model.encoder(images)
        level = NOISE * torch.rand(len(images), 1, 1, 1, device=where)
        loss = reconstruction_loss(
            model.decoder(latents + level * torch.randn_like(latents)), images
        )
        if not decoder_only:
            loss = loss + 0.003 * unit_latents_loss(latents)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * clock.rate(warmup=0.03)
        optimizer.step()
        optimizer.zero_grad()
        follow(average, model, len(losses), 0.998)
        losses.append(loss.item())
        if len(losses) % 500 == 0:
            mean = np.mean(losses[-500:])
            quality = psnr(average, held_back)
            print(f"{len(losses)} {clock} loss {mean:.4f} photos {quality:.1f} dB", flush=True)
            save({"model": average.state_dict()}, CHECKPOINT)
    save({"model": average.state_dict()}, CHECKPOINT)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents")
    train(**vars(parser.parse_args()))
