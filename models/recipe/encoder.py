"""Creates an AutoencoderTiny of diffusers with 32 channels, which makes images 8x smaller in each
direction, and its encoder.

The encoder is a linear code that is computed, not trained (`basis.py`): `python -m recipe.encoder`.
Latents and all trained weights belong to it, so an existing one is kept.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn

from recipe import paths
from recipe.basis import deviations_of, set_encoder
from recipe.crops import Crops
from recipe.runtime import save

ENCODER = paths.CHECKPOINTS / "encoder.pt"
WIDTH, LATENT_CHANNELS = 48, 32
ENCODER_BLOCKS, DECODER_BLOCKS = (0, 0, 0, 0), (3, 2, 1, 0)
CROPS, SIDE = 1500, 64  # number of pixels from which the code is computed


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
            # layers of an AutoencoderTinyBlock: convolution and ReLU, three times
            last_of_branch = name.endswith("conv.4")
            nn.init.orthogonal_(module.weight, gain=0.2 if last_of_branch else 1.2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)


def to_model(images: np.ndarray) -> torch.Tensor:
    """Converts uint8 N x H x W x 3 to float N x 3 x H x W in -1..1."""
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    return (tensor / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_images(tensor: torch.Tensor) -> np.ndarray:
    """Converts float N x 3 x H x W in -1..1 to uint8 N x H x W x 3."""
    pixels = (tensor.clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def build() -> None:
    if ENCODER.exists():
        print(f"{ENCODER} is kept: weights belong to it")
        return
    model = new_autoencoder()
    set_encoder(model.encoder, to_model(Crops(seed=0).draw(CROPS, SIDE)))
    save(model.encoder.state_dict(), ENCODER)


def encoder_state() -> dict[str, torch.Tensor]:
    """Returns the state of the encoder. Raises SystemExit if there is none."""
    if not ENCODER.exists():
        raise SystemExit(f"{ENCODER} does not exist: run `python -m recipe.encoder`")
    state: dict[str, torch.Tensor] = torch.load(ENCODER, map_location="cpu", weights_only=True)
    return state


def load_encoder() -> nn.Module:
    encoder: nn.Module = new_autoencoder().encoder
    encoder.load_state_dict(encoder_state())
    return encoder.eval().requires_grad_(False)


def channel_deviations() -> torch.Tensor:
    """Returns how much each latent channel changes pixels, as a standard deviation over a block."""
    return deviations_of(load_encoder())


def encoder_key() -> str:
    """Returns a name computed from the encoder's weights. Half precision does not change it."""
    digest = sha256()
    for name, value in sorted(encoder_state().items()):
        digest.update(name.encode() + value.half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    build()
