"""Generates images with the exported model through the stock diffusers pipeline."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from recipe import paths
from recipe.photos import Photo, open_photo, photos


@cache
def pipeline(directory: Path = paths.EXPORT) -> StableDiffusionImg2ImgPipeline:
    loaded = StableDiffusionImg2ImgPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    loaded.unet.to(memory_format=torch.channels_last)
    loaded.vae.to(memory_format=torch.channels_last)
    return loaded


@cache
def defaults(directory: Path = paths.EXPORT) -> dict[str, float]:
    return tomllib.loads((directory / "img2img.toml").read_text())["defaults"]


def restyle(
    image: np.ndarray, prompt: str, seed: int = 0, strength: float | None = None, **changes: object
) -> np.ndarray:
    """Returns an image (uint8), by default with the model's defaults.

    At strength 0 the stock pipeline has no step to run, so the photo is encoded and decoded, which
    shows the error of the autoencoder. (The service returns the init image itself.)
    """
    chosen = defaults()
    strength = chosen["strength"] if strength is None else strength
    if strength == 0:
        return roundtrip(image[None])[0]
    arguments = {
        "num_inference_steps": int(chosen["num_inference_steps"]),
        "guidance_scale": chosen["guidance_scale"],
        **changes,
    }
    generator = torch.Generator().manual_seed(seed)
    output = pipeline()(
        prompt, Image.fromarray(image), strength=strength, generator=generator, **arguments
    )
    return np.asarray(output.images[0])


@torch.inference_mode()
def roundtrip(images: np.ndarray) -> np.ndarray:
    """Encodes and decodes with the exported autoencoder; uint8 N x H x W x 3."""
    vae = pipeline().vae
    tensor = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = torch.cat([vae.decode(vae.encode(one[None]).latents).sample for one in tensor])
    pixels = (decoded.clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def square(photo: Photo, side: int = 512) -> np.ndarray:
    """Returns the centre of the photo, side x side."""
    image = Image.fromarray(open_photo(photo))
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box=box))


def held_out(count: int, side: int = 512) -> list[np.ndarray]:
    return [square(photo, side) for photo in photos("test")[:count]]


def subject(photo: Photo) -> str:
    """Returns a plain word for the prompt: `animal-red-panda` becomes `a red panda`."""
    return "a " + photo.id.split("-", 1)[1].replace("-", " ")
