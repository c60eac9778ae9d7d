"""The autoencoder: diffusers' AutoencoderTiny, 8x smaller in each direction, 8 channels.

`python -m recipe.autoencoder --minutes 12` trains it on the rendered views;
`--resume --decoder-only` goes on with the decoder while the latents stay what they are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn

from recipe import paths
from recipe.looks import NAMES
from recipe.runtime import Clock, device, save

WIDTH, LATENT_CHANNELS = 32, 16
CHECKPOINT = paths.CHECKPOINTS / "autoencoder.pt"


def new_autoencoder() -> AutoencoderTiny:
    model = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 2, 2, 0),
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
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model.eval().requires_grad_(False)


def to_model(images: np.ndarray) -> torch.Tensor:
    """uint8 N x H x W x 3 -> float N x 3 x H x W in -1..1."""
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    return (tensor / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_images(tensor: torch.Tensor) -> np.ndarray:
    """float N x 3 x H x W in -1..1 -> uint8 N x H x W x 3."""
    pixels = (tensor.clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def random_crops(renders: np.ndarray, batch: int, side: int, rng: np.random.Generator):
    """Half photos, the rest any look."""
    out = np.empty((batch, side, side, 3), np.uint8)
    for i in range(batch):
        look = 0 if rng.random() < 0.5 else rng.integers(len(NAMES))
        top, left = rng.integers(0, renders.shape[2] - side + 1, 2)
        out[i] = renders[rng.integers(len(renders)), look, top : top + side, left : left + side]
    return to_model(out)


def reconstruction_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of the pixels, L1 of their differences (lines and dots)."""
    error = got - want
    slope = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * slope


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
    """Returns the loss of every step; goes on past the time until `at_least` steps are done."""
    renders = np.load(paths.LATENTS / "renders.npy", mmap_mode="r")
    rng = np.random.default_rng(int(time.time()) if resume else 0)
    where = device()
    model = (load_autoencoder() if resume else new_autoencoder()).to(where).train()
    trained = model.decoder if decoder_only else model
    trained.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0)
    clock = Clock(minutes, at_least=at_least)
    losses: list[float] = []
    while clock.tick():
        for group in optimizer.param_groups:
            group["lr"] = rate * clock.rate(warmup=0.03)
        images = random_crops(renders, batch, side, rng).to(where)
        with torch.set_grad_enabled(not decoder_only):
            latents = model.encoder(images)
        # The denoiser's latents are never exact: the decoder learns to overlook small errors.
        level = 0.12 * torch.rand(len(images), 1, 1, 1, device=where)
        noisy = latents + level * torch.randn_like(latents)
        loss = reconstruction_loss(model.decoder(noisy), images)
        if not decoder_only:
            loss = loss + 0.01 * unit_latents_loss(latents)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 200 == 0:
            quality = psnr(model, to_model(renders[::16, 0]).to(where))
            mean = np.mean(losses[-200:])
            print(f"{len(losses)} {clock} loss {mean:.4f} photos {quality:.1f} dB", flush=True)
    save({"model": model.state_dict()}, CHECKPOINT)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents")
    train(**vars(parser.parse_args()))
