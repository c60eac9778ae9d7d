"""One run of everything at one size, so that the first real job pays for nothing."""

from __future__ import annotations

import numpy as np
import torch

from img2img_server.engine.denoiser import Denoiser, TextInput
from img2img_server.engine.memory import MemoryModel


def exercise(
    denoiser: Denoiser, memory: MemoryModel, height: int, width: int, forwards: int
) -> None:
    """Encodes, denoises `forwards` unguided rows in one forward, decodes and makes a preview."""
    text = TextInput(prompt="", negative_prompt="", guidance_scale=1.0, height=height, width=width)
    (conditioning,) = denoiser.encode_texts([text])
    images = [np.zeros((height, width, 3), np.uint8)]
    images *= min(forwards, denoiser.max_vae_batch(height, width))
    latents = torch.stack([image.mean for image in denoiser.encode_images(images)])
    rows = [latents[:1]] * forwards
    timesteps = torch.full((forwards,), 500.0, device=denoiser.device)
    for _ in range(denoiser.warm_up_calls):
        with memory.measured(height, width, forwards):
            denoiser.denoise(rows, timesteps, [conditioning] * forwards)
    denoiser.decode(latents)
    denoiser.preview(latents[:1])
