"""The autoencoder: diffusers' AutoencoderTiny, 8x smaller in each direction, 32 channels.

The encoder is a linear code that is computed, not trained (`basis.py`), so latents never change
and the denoiser need not wait. `python -m recipe.autoencoder --minutes 30` trains the decoder on
photos and rendered views; `--resume` goes on with it.
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
from torch.nn import functional

from recipe import paths
from recipe.basis import set_encoder
from recipe.crops import Crops
from recipe.muon import optimizers, set_rate
from recipe.runtime import Clock, device, follow, save

WIDTH, LATENT_CHANNELS = 48, 32
ENCODER_BLOCKS, DECODER_BLOCKS = (0, 0, 0, 0), (3, 2, 1, 0)
NOISE = 0.1  # deviation; the denoiser's latents are never exact, and the decoder learns that
HINTS = 0.3  # weight of what the inner resolutions are asked for
BASIS_CROPS, BASIS_SIDE = 1500, 64
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
    for name, module in model.decoder.named_modules():
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


def channel_deviations(path: Path = CHECKPOINT) -> torch.Tensor:
    """How far each latent channel moves the pixels: its deviation over the blocks' 192 values."""
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state["deviations"]


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


class Hints(nn.Module):
    """Asks the decoder's inner resolutions for the picture too, each by a linear map.

    Upsampling repeats pixels, and telling the four copies apart is what a decoder finds hardest;
    told where it stands at 1/4 and 1/2 it learns several times faster. Used in training only.
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
        """Of the decoder's last pass, whose result should have been `images`."""
        losses = [
            reconstruction_loss(head(seen), functional.pixel_unshuffle(images, fold))
            for head, seen, fold in zip(self.heads, self._seen, self._folds, strict=True)
        ]
        self._seen.clear()
        return torch.stack(losses).sum()


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
    rate: float = 0.015,
    resume: bool = False,
    at_least: int = 0,
) -> list[float]:
    """Returns the loss of every step; goes on past the time until `at_least` steps are done.

    What is saved is the running average of the weights.
    """
    where = device()
    crops = Crops(seed=int(time.time()) if resume else 0)
    model = load_autoencoder() if resume else new_autoencoder()
    if resume:
        deviations = channel_deviations()
    else:
        deviations = set_encoder(model, to_model(crops.draw(BASIS_CROPS, BASIS_SIDE)))
    average = copy.deepcopy(model).to(where).requires_grad_(False)
    model.to(where).train().requires_grad_(False)
    decoder = model.decoder.requires_grad_(True)
    hints = Hints(decoder).to(where)
    chosen = optimizers(decoder, rate, adam_rate=0.06 * rate)
    chosen_hints = torch.optim.Adam(hints.parameters(), 2e-3)
    held_back = to_model(crops.views[::16, 0]).to(where)
    clock = Clock(minutes, at_least=at_least)
    losses: list[float] = []

    def keep() -> None:
        save({"model": average.state_dict(), "deviations": deviations}, CHECKPOINT)

    keep()  # latents can be computed from now on
    while clock.tick():
        images = to_model(crops.draw(batch, side)).to(where)
        latents = model.encoder(images)
        level = NOISE * torch.rand(len(images), 1, 1, 1, device=where)
        loss = reconstruction_loss(decoder(latents + level * torch.randn_like(latents)), images)
        (loss + HINTS * (1 - clock.done) * hints.loss(images)).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        set_rate(chosen, clock.rate(warmup=0.03))
        for optimizer in (*chosen, chosen_hints):
            optimizer.step()
            optimizer.zero_grad()
        follow(average, model, len(losses), 0.998)
        losses.append(loss.item())
        if len(losses) % 500 == 0:
            mean = np.mean(losses[-500:])
            quality = psnr(average, held_back)
            print(f"{len(losses)} {clock} loss {mean:.4f} photos {quality:.1f} dB", flush=True)
            keep()
    keep()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.015)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    train(**vars(parser.parse_args()))
