"""The Denoiser of diffusers models: Stable Diffusion 1.x, 2.x, Turbo, LCM, and SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from img2img_server.domain.job import Determinism
from img2img_server.engine import preview
from img2img_server.engine.base import Pixels
from img2img_server.engine.denoiser import Conditioning, ImageLatents, TextEmbedding, TextInput
from img2img_server.engine.diffusers.load import accelerate, admit_shapes, load_pipeline
from img2img_server.engine.diffusers.lora import LoraSet
from img2img_server.engine.diffusers.schedules import Schedules
from img2img_server.engine.diffusers.text import TextEncoder
from img2img_server.engine.diffusers.vae import Autoencoder
from img2img_server.engine.host_copy import HostCopy, copy_to_host, to_device
from img2img_server.engine.options import Compile, ModelOptions, batch_size_buckets, pad_batch_size
from img2img_server.engine.sampler import Schedule

# Measured with the packaged model at 256 and 320 pixels a side: a step takes 13 ms beyond what it
# takes for each row, which on two cores is 65,000 to 78,000 pixels x forwards, on one half of that.
_CPU_STEP_OVERHEAD_PER_THREAD = 35_000

# What passes the autoencoder at once on a GPU: its full-resolution layers need far more memory
# than the UNet. A CPU gains nothing from company there, and the first picture would wait.
_MAX_AUTOENCODER_PIXELS = 4 * 1024 * 1024


class _Forward(NamedTuple):
    """One row of the UNet's batch: what it starts from, and its text."""

    row: int
    text: TextEmbedding
    conditioning: Conditioning


class DiffusersDenoiser:
    """A pipeline's networks without the pipeline's loop.

    Args:
        pipeline: an image-to-image pipeline of the Stable Diffusion or SDXL family, on its device.
        tiny_vae: an AutoencoderTiny for previews, on the same device.
        loras: the adapters that requests may name.
        capacity_rows: most forwards of a batch; those of compiled models are filled up to one of a
            few sizes below it.
    """

    def __init__(
        self,
        pipeline: Any,
        options: ModelOptions | None = None,
        *,
        tiny_vae: Any = None,
        loras: LoraSet | None = None,
        capacity_rows: int = 8,
    ) -> None:
        options = options or ModelOptions()
        self._unet = pipeline.unet
        # Kept, since diffusers walks through all modules to tell them: milliseconds each time.
        self._device = torch.device(pipeline.unet.device)
        self._unet_dtype = pipeline.unet.dtype
        # One for all steps: what is compiled is compiled for the strides of its inputs.
        self._format = torch.channels_last if options.channels_last else torch.contiguous_format
        self._is_compiled = options.compile is not Compile.OFF
        self._capacity_rows = capacity_rows
        self._schedules = Schedules(pipeline.scheduler.config)
        self._text = TextEncoder(pipeline)
        self._loras = loras or LoraSet(pipeline, None)
        self._autoencoder = Autoencoder(pipeline.vae, options.vae_tile_pixels)
        self._tiny = Autoencoder(tiny_vae, options.vae_tile_pixels) if tiny_vae else None
        # Models distilled with guidance take the scale as an input and need no second forward.
        self._is_guidance_embedded = self._unet.config.time_cond_proj_dim is not None
        self._projection = preview.fit_projection(self._encode_for_fit).to(self.device)

    @classmethod
    def load(
        cls,
        source: str,
        device: torch.device,
        dtype: torch.dtype,
        options: ModelOptions | None = None,
        capacity_rows: int = 8,
    ) -> Self:
        """Loads a directory or hub id of diffusers.

        Raises:
            ModelError: it cannot be loaded, or is of another family.
        """
        options = options or ModelOptions()
        pipeline, tiny = load_pipeline(source, device, dtype, options)
        loras = LoraSet(pipeline, options.lora_dir)
        accelerate(pipeline, options)
        return cls(pipeline, options, tiny_vae=tiny, loras=loras, capacity_rows=capacity_rows)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return str(self.device)

    @property
    def determinism(self) -> Determinism:
        # What a row shares its batches with decides how the last bits of its sums round.
        is_shown = self._device.type == "cpu" and self._unet_dtype == torch.float32
        return Determinism.BOUNDED if is_shown else Determinism.CLOSE

    def forwards(self, guidance_scale: float) -> int:
        return 2 if guidance_scale > 1 and not self._is_guidance_embedded else 1

    def padded_batch_size(self, forwards: int) -> int:
        return pad_batch_size(forwards, self._capacity_rows) if self._is_compiled else forwards

    @property
    def fixed_step_cost(self) -> int | None:
        if self.device.type != "cpu":
            return None
        return _CPU_STEP_OVERHEAD_PER_THREAD * torch.get_num_threads()

    @property
    def warm_up_forwards(self) -> tuple[int, ...]:
        if self.device.type == "cpu" and not self._is_compiled:
            return (1,)
        return batch_size_buckets(self._capacity_rows)

    @property
    def warm_up_calls(self) -> int:
        # A CUDA graph is built in the first call, captured in the second, played in the third.
        return 3 if self.device.type == "cuda" and self._is_compiled else 1

    def max_vae_batch(self, height: int, width: int) -> int:
        if self.device.type == "cpu":
            return 1
        return max(1, _MAX_AUTOENCODER_PIXELS // (height * width))

    def schedule(self, name: str, num_inference_steps: int, strength: float) -> Schedule:
        return self._schedules.get(name, num_inference_steps, strength)

    @property
    def loras(self) -> tuple[str, ...]:
        """What `Adapter` may name."""
        return self._loras.names

    def encode_texts(self, texts: Sequence[TextInput]) -> list[Conditioning]:
        self._loras.use(texts[0].adapter)
        return self._text.encode(texts, [self.forwards(text.guidance_scale) for text in texts])

    def clear_cache(self) -> None:
        self._text.clear_cache()

    def encode_images(self, images: Sequence[Pixels]) -> list[ImageLatents]:
        pixels = to_device(torch.from_numpy(np.stack(images)), self.device)
        mean, deviation = self._autoencoder.encode(pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1)
        return [
            ImageLatents(mean[i], deviation[i] if deviation is not None else None)
            for i in range(len(images))
        ]

    def denoise(
        self, latents: Tensor, timesteps: Tensor, conditionings: Sequence[Conditioning]
    ) -> Tensor:
        self._loras.use(conditionings[0].adapter)
        # Guided rows come a second time, after all others, with their negative prompt.
        forwards = [_Forward(i, it.prompt, it) for i, it in enumerate(conditionings)]
        forwards += [
            _Forward(i, it.negative, it)
            for i, it in enumerate(conditionings)
            if it.negative is not None
        ]
        count = len(forwards)
        if self._is_compiled:
            admit_shapes()
            forwards += forwards[-1:] * (self.padded_batch_size(count) - count)
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        rows = [forward.row for forward in forwards]
        steering = [(forward.text, forward.conditioning) for forward in forwards]
        output = self._unet(
            torch.cat([latents[i : i + 1] for i in rows]).to(
                self._unet_dtype, memory_format=self._format
            ),
            torch.cat([timesteps[i : i + 1] for i in rows]),
            encoder_hidden_states=torch.stack([text.tokens for text, _ in steering]),
            timestep_cond=self._guidance_embeddings([row for _, row in steering]),
            added_cond_kwargs=self._text.added_conditions(steering),
            return_dict=False,
        )[0].float()
        results = list(output[: len(conditionings)].split(1))
        for place in range(len(conditionings), count):
            row, without = forwards[place].row, output[place : place + 1]
            scale = conditionings[row].guidance_scale
            results[row] = without + scale * (results[row] - without)
        return torch.cat(results)

    def decode(self, latents: Tensor) -> Sequence[HostCopy]:
        images = self._autoencoder.decode(latents)
        return copy_to_host(_pixels(images), torch.isfinite(images).flatten(1).all(1))

    def preview(self, latents: Tensor) -> Sequence[HostCopy]:
        if self._tiny is not None:
            return copy_to_host(_pixels(preview.shrink(self._tiny.decode(latents))))
        return copy_to_host(preview.project(latents, self._projection))

    @torch.inference_mode()
    def _encode_for_fit(self, images: Tensor) -> Tensor:
        return self._autoencoder.encode(images.to(self.device))[0].cpu()

    def _guidance_embeddings(self, conditionings: Sequence[Conditioning]) -> Tensor | None:
        found = [row.guidance_embedding for row in conditionings]
        present = [embedding for embedding in found if embedding is not None]
        return torch.cat(present).to(self._unet_dtype) if present else None


def _pixels(images: Tensor) -> Tensor:
    """From about -1..1, n x 3 x h x w, to uint8, n x h x w x 3."""
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
