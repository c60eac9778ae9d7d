"""The Denoiser of diffusers models: Stable Diffusion 1.x, 2.x, Turbo, LCM, and SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from img2img_server.engine import preview
from img2img_server.engine.base import Pixels
from img2img_server.engine.denoiser import Conditioning, ImageLatents, TextInput
from img2img_server.engine.diffusers_schedules import Schedules
from img2img_server.engine.diffusers_text import TextEncoder
from img2img_server.engine.model_spec import ModelError
from img2img_server.engine.sampler import Schedule
from img2img_server.errors import EngineError

# Measured with the packaged model at 256, 320 and 512 pixels a side: a step takes 10 ms beyond what
# it takes for each row, which on one core is 33,000 pixels x forwards, on two 60,000.
_CPU_STEP_OVERHEAD = 40_000

# What passes the autoencoder at once on a GPU: its full-resolution layers need far more memory
# than the UNet. A CPU gains nothing from company there, and the first picture would wait.
_MAX_AUTOENCODER_PIXELS = 4 * 1024 * 1024


class DiffusersDenoiser:
    """A pipeline's networks without the pipeline's loop.

    Args:
        pipeline: an image-to-image pipeline of the Stable Diffusion or SDXL family, on its device.
    """

    def __init__(self, pipeline: Any) -> None:
        self._unet = pipeline.unet
        self._vae = pipeline.vae
        # Kept, since diffusers walks through all modules to tell them: milliseconds each time.
        self._device = torch.device(pipeline.unet.device)
        self._unet_dtype, self._vae_dtype = pipeline.unet.dtype, pipeline.vae.dtype
        self._schedules = Schedules(pipeline.scheduler.config)
        self._text = TextEncoder(pipeline)
        config = self._vae.config
        self._shift, self._scale = _latent_scaling(config, self.device)
        # Models distilled with guidance take the scale as an input and need no second forward.
        self._is_guidance_embedded = self._unet.config.time_cond_proj_dim is not None
        self._projection = preview.fit_projection(self._encode_for_fit).to(self.device)

    @classmethod
    def load(cls, source: str, device: torch.device, dtype: torch.dtype) -> Self:
        """Loads a directory or hub id of diffusers. fp16 files are widened where dtype says so.

        Raises:
            ModelError: it cannot be loaded, or is of another family.
        """
        for logging in (diffusers_logging, transformers_logging):
            logging.set_verbosity_error()  # they would log prompts that are too long
            logging.disable_progress_bar()
        # Only now: the import alone logs what none of our models needs.
        from diffusers import AutoPipelineForImage2Image

        try:
            pipeline = AutoPipelineForImage2Image.from_pretrained(  # type: ignore[no-untyped-call]
                source, dtype=dtype, safety_checker=None, requires_safety_checker=False
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load {source}: {error}") from error
        if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
            raise ModelError(f"{source} is not of the Stable Diffusion or SDXL family")
        pipeline.to(device)
        for part in (pipeline.unet, pipeline.vae):
            # Measured on a CPU: decoding takes 0.6 of the time; GPUs with tensor cores gain too.
            part.to(memory_format=torch.channels_last)
        if dtype == torch.float16 and pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)  # it overflows in half precision
        return cls(pipeline)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return str(self.device)

    def slots(self, guidance_scale: float) -> int:
        return 2 if guidance_scale > 1 and not self._is_guidance_embedded else 1

    @property
    def step_overhead(self) -> int | None:
        return _CPU_STEP_OVERHEAD if self.device.type == "cpu" else None

    def pictures_at_once(self, height: int, width: int) -> int:
        if self.device.type == "cpu":
            return 1
        return max(1, _MAX_AUTOENCODER_PIXELS // (height * width))

    def schedule(self, name: str, num_inference_steps: int, strength: float) -> Schedule:
        return self._schedules.get(name, num_inference_steps, strength)

    def encode_texts(self, texts: Sequence[TextInput]) -> list[Conditioning]:
        return self._text.encode(texts, [self.slots(text.guidance_scale) for text in texts])

    def clear_cache(self) -> None:
        self._text.clear_cache()

    def encode_images(self, images: Sequence[Pixels]) -> list[ImageLatents]:
        pixels = torch.from_numpy(np.stack(images)).to(self.device)
        mean, deviation = self._encode(pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1)
        return [
            ImageLatents(mean[i], deviation[i] if deviation is not None else None)
            for i in range(len(images))
        ]

    def denoise(
        self, latents: Tensor, timesteps: Tensor, conditionings: Sequence[Conditioning]
    ) -> Tensor:
        # Guided rows come a second time, after all others, with their negative prompt.
        guided = [i for i, row in enumerate(conditionings) if row.negative is not None]
        rows = [*range(len(conditionings)), *guided]
        texts = [row.prompt for row in conditionings]
        texts += [row.negative for row in conditionings if row.negative is not None]
        output = self._unet(
            torch.cat([latents[i : i + 1] for i in rows]).to(self._unet_dtype),
            torch.cat([timesteps[i : i + 1] for i in rows]),
            encoder_hidden_states=torch.stack([text.tokens for text in texts]),
            timestep_cond=self._guidance_embeddings(conditionings),
            added_cond_kwargs=self._text.added_conditions(conditionings),
            return_dict=False,
        )[0].float()
        results = list(output[: len(conditionings)].split(1))
        for place, i in enumerate(guided, start=len(conditionings)):
            without = output[place : place + 1]
            results[i] = without + conditionings[i].guidance_scale * (results[i] - without)
        return torch.cat(results)

    def decode(self, latents: Tensor) -> list[Pixels]:
        scaled = (latents / self._scale + self._shift).to(self._vae_dtype)
        images = self._vae.decode(scaled, return_dict=False)[0].float()
        if not bool(torch.isfinite(images).all()):
            raise EngineError("the model's picture is not made of finite numbers")
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def preview(self, latents: Tensor) -> list[Pixels]:
        return list(preview.project(latents, self._projection).cpu().numpy())

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = self._vae.encode(images.to(self._vae_dtype))
        if hasattr(encoded, "latent_dist"):
            mean, deviation = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
            return (mean - self._shift) * self._scale, deviation * self._scale
        return (encoded.latents.float() - self._shift) * self._scale, None

    @torch.inference_mode()
    def _encode_for_fit(self, images: Tensor) -> Tensor:
        return self._encode(images.to(self.device))[0].cpu()

    def _guidance_embeddings(self, conditionings: Sequence[Conditioning]) -> Tensor | None:
        found = [row.guidance_embedding for row in conditionings]
        present = [embedding for embedding in found if embedding is not None]
        return torch.cat(present).to(self._unet_dtype) if present else None


def _latent_scaling(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and scale: latents = (encoded - shift) * scale. Only a few SDXL models shift."""
    scale = torch.tensor(float(config.scaling_factor), device=device)
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return torch.zeros((), device=device), scale
    shift = torch.tensor(mean, device=device).reshape(1, -1, 1, 1)
    return shift, scale / torch.tensor(deviation, device=device).reshape(1, -1, 1, 1)
