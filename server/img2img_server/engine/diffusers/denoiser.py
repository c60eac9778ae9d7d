"""The Denoiser of diffusers models of every family."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
from torch import Tensor

from img2img_server.default_dtype import DEFAULT_DTYPE
from img2img_server.domain.job import Determinism
from img2img_server.domain.models import ModelKind
from img2img_server.domain.strength import StrengthMode
from img2img_server.engine import preview
from img2img_server.engine.denoiser import (
    Adapter,
    Conditioning,
    Embeddings,
    ImageLatents,
    TextInput,
)
from img2img_server.engine.diffusers.embeddings import EmbeddingSet
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.families.base import Family, Forward, LoadedModel
from img2img_server.engine.diffusers.fingerprint import fingerprint
from img2img_server.engine.diffusers.load import (
    accelerate,
    admit_shapes,
    load_pipeline,
)
from img2img_server.engine.diffusers.local_model import LocalModel, find_model
from img2img_server.engine.diffusers.lora import LoraSet
from img2img_server.engine.diffusers.lora_layers import Part
from img2img_server.engine.diffusers.lora_use import LoraUse, most_branch_work
from img2img_server.engine.diffusers.placement import PlacedPart, modules, placed_parts
from img2img_server.engine.diffusers.schedules import Schedules
from img2img_server.engine.diffusers.text import TextEncoder
from img2img_server.engine.diffusers.vae import Autoencoder
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.host_copy import HostCopy, copy_to_host, to_device
from img2img_server.engine.options import Compile, ModelOptions, batch_size_buckets, pad_batch_size
from img2img_server.engine.sampler import Schedule
from img2img_server.imaging.base import Pixels

# Measured with the packaged model at 256 and 320 pixels a side: a step takes 13 ms in addition to
# the time of its rows. That is the time of 65,000 to 78,000 pixels x forwards on two cores, and of
# half as many on one core.
_CPU_STEP_OVERHEAD_PER_THREAD = 35_000

# Pixels in one batch of the autoencoder on a GPU: its full-resolution layers need far more memory
# than the denoiser. On a CPU batching does not help, and the first image would wait.
_MAX_AUTOENCODER_PIXELS = 4 * 1024 * 1024

# The options that change how a step computes, in addition to the weights.
_ARITHMETIC = (
    "channels_last",
    "fuse_qkv",
    "compile",
    "vae_tile_pixels",
    "text_encoder_placement",
    "quantization",
)

# Prompts for the warm-up: an empty one, one whose length is no multiple of 32 (Z-Image pads it to
# one), and one that is longer than the longest prompt.
_WARM_UP_PROMPTS = ("", "a " * 100, "a " * 2048)


class DiffusersDenoiser:
    """A pipeline's networks without the pipeline's loop.

    Args:
        pipeline: An image-to-image pipeline of diffusers, on its device.
        tiny_vae: An AutoencoderTiny for previews, on the same device.
        lora_dir: The folder of the LoRAs that requests may name.
        embeddings_dir: The folder of the textual inversion embeddings that prompts may name.
        max_batch_size: The largest batch, in forwards; batches of compiled models are padded to one
            of a few sizes below it.
        family: None: the family that serves the pipeline's class.
        device: The device of the latents; None: the device on which the denoiser is.

    Raises:
        ModelError: No family serves the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        options: ModelOptions | None = None,
        *,
        tiny_vae: Any = None,
        lora_dir: Path | None = None,
        embeddings_dir: Path | None = None,
        max_batch_size: int = 8,
        family: Family | None = None,
        device: torch.device | None = None,
    ) -> None:
        options = options or ModelOptions()
        self._family = family or detect(ModelFiles.of_pipeline(pipeline), "the pipeline")
        network = getattr(pipeline, self._family.denoiser)
        is_compiled = options.compile is not Compile.OFF
        is_last = options.channels_last and self._family.kind is ModelKind.DIFFUSION
        self._model = LoadedModel(
            pipeline=pipeline,
            network=network,
            device=torch.device(device or network.device),
            dtype=network.dtype,
            memory_format=torch.channels_last if is_last else torch.contiguous_format,
            is_compiled=is_compiled,
        )
        self._is_compiled = is_compiled
        self._max_batch_size = max_batch_size
        self._schedules = Schedules(
            self._family,
            self._family.scheduler_config(pipeline.config, pipeline.scheduler.config),
        )
        self._text = TextEncoder(self._model, self._family, options.text_encoder_placement)
        self._loras = LoraSet(self._model, self._family, lora_dir)
        most_work = most_branch_work(self.device, is_compiled=is_compiled)
        self._denoiser_loras = LoraUse(Part.DENOISER, most_work)
        self._text_loras = LoraUse(Part.TEXT, most_work)
        self._embeddings = EmbeddingSet(self._model, self._family, embeddings_dir)
        self._codec = self._family.codec(pipeline.vae, options.vae_tile_pixels)
        self._tiny = Autoencoder(tiny_vae, options.vae_tile_pixels) if tiny_vae else None
        self._state_key = self._key(options)
        self._projection = preview.fit_projection(self._encode_for_fit).to(self.device)

    @classmethod
    def load(
        cls,
        source: str | LocalModel,
        device: torch.device,
        dtype: torch.dtype,
        options: ModelOptions | None = None,
        max_batch_size: int = 8,
    ) -> Self:
        """Loads a model.

        Args:
            source: A directory or hub id, or the files that `find_model` found.

        Raises:
            ModelError: It cannot be loaded, or no family serves it.
        """
        options = options or ModelOptions()
        if isinstance(source, str):
            source = find_model(source, allow_pickles=options.allow_pickles)
        family = source.family
        pipeline, tiny = load_pipeline(source, device, dtype, options)
        denoiser = cls(
            pipeline,
            options,
            tiny_vae=tiny,
            lora_dir=options.lora_dir,
            embeddings_dir=options.embeddings_dir,
            max_batch_size=max_batch_size,
            family=family,
            device=device,
        )
        accelerate(
            denoiser._model.network,
            options,
            family.lengths_vary,
            can_fuse=family.can_fuse_projections,
        )
        return denoiser

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def schedules(self) -> Schedules:
        """Returns the schedules of the model."""
        return self._schedules

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return str(self.device)

    @property
    def state_key(self) -> str:
        # The files of LoRAs and embeddings may change while the engine runs.
        files = self._loras.fingerprint + self._embeddings.current.key
        return hashlib.sha256((self._state_key + files).encode()).hexdigest()

    @property
    def current_embeddings(self) -> Embeddings:
        return self._embeddings.current

    def _key(self, options: ModelOptions) -> str:
        """Returns a hash of all that the arithmetic of a step depends on."""
        pipeline = self._model.pipeline
        kind = self.device.type
        parts = (
            fingerprint(modules(pipeline)),
            type(pipeline).__name__,
            {name: repr(part) for name, part in pipeline.components.items() if name == "scheduler"},
            str(self._model.dtype),
            torch.backends.cpu.get_cpu_capability() if kind == "cpu" else self.device_name,
            torch.__version__,
            diffusers.__version__,
            {name: repr(getattr(options, name)) for name in _ARITHMETIC},
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def determinism(self) -> Determinism:
        # The other rows of a batch affect how the last bits of sums are rounded.
        is_shown = self.device.type == "cpu" and self._model.dtype == torch.float32
        return Determinism.BOUNDED if is_shown else Determinism.CLOSE

    def forwards(self, text: TextInput) -> int:
        return self._family.forwards(self._model.network.config, text)

    def batch_key(self, text: TextInput) -> Hashable:
        return self._family.batch_key(text)

    def padded_batch_size(self, forwards: int) -> int:
        return pad_batch_size(forwards, self._max_batch_size) if self._is_compiled else forwards

    @property
    def fixed_step_cost(self) -> int | None:
        if self.device.type != "cpu":
            return None
        return _CPU_STEP_OVERHEAD_PER_THREAD * torch.get_num_threads()

    @property
    def warm_up_forwards(self) -> tuple[int, ...]:
        if self.device.type == "cpu" and not self._is_compiled:
            return (1,)
        return batch_size_buckets(self._max_batch_size)

    @property
    def warm_up_prompts(self) -> tuple[str, ...]:
        if self._is_compiled and self._family.clip_encoders(self._model):
            return "", _WARM_UP_PROMPTS[-1]
        if not self._family.lengths_vary:
            return ("",)
        return _WARM_UP_PROMPTS if self._is_compiled else _WARM_UP_PROMPTS[-1:]

    @property
    def warm_up_calls(self) -> int:
        # A CUDA graph is built in the first call, captured in the second and replayed in the third.
        return 3 if self.device.type == "cuda" and self._is_compiled else 1

    def max_vae_batch(self, height: int, width: int) -> int:
        if self.device.type == "cpu":
            return 1
        return max(1, _MAX_AUTOENCODER_PIXELS // (height * width))

    def schedule(
        self,
        name: str,
        num_inference_steps: int,
        strength: float,
        height: int,
        width: int,
        mode: StrengthMode = StrengthMode.STEPS,
    ) -> Schedule:
        return self._schedules.get(name, num_inference_steps, strength, height, width, mode)

    @property
    def parts(self) -> Sequence[PlacedPart]:
        """The parts of the model and the memory of each."""
        return placed_parts(self._model.pipeline)

    def weights_not_finite(self) -> list[str]:
        """Returns the names of weights that are infinite or not numbers, with their parts."""
        return [
            f"{part}: {name}"
            for part, network in modules(self._model.pipeline).items()
            for name, weight in network.named_parameters()
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all())
        ]

    @property
    def loras(self) -> tuple[str, ...]:
        """The names that `Adapter` may have."""
        return self._loras.names

    @property
    def refused_loras(self) -> tuple[tuple[str, str], ...]:
        """The names of LoRA files that are not offered, each with the reason."""
        return self._loras.refusals

    def adapter(self, name: str, scale: float) -> Adapter:
        return self._loras.adapter(name, scale)

    def adapter_key(self, adapters: tuple[Adapter, ...]) -> Hashable:
        return self._denoiser_loras.written(adapters)

    def refresh_loras(self) -> bool:
        """Reads the folder of LoRAs again; any thread may call it. Returns whether it changed."""
        return self._loras.refresh()

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The tokens of textual inversion embeddings that prompts may have."""
        return self._embeddings.tokens

    def refresh_embeddings(self) -> bool:
        """Reads the folder of embeddings again; any thread may call it. Returns whether it
        changed.
        """
        return self._embeddings.refresh()

    def encode_texts(self, texts: Sequence[TextInput]) -> list[Conditioning]:
        current = self._embeddings.current
        found: dict[int, Conditioning] = {}
        groups: dict[tuple[Embeddings, tuple[Adapter, ...]], list[int]] = {}
        for index, text in enumerate(texts):
            adapters = self._text_loras.effective(text.adapters)
            groups.setdefault((text.embeddings or current, adapters), []).append(index)
        # Each change of the embeddings drops the cached prompts.
        for embeddings, adapters in sorted(groups, key=lambda group: group[0].key):
            indices = groups[embeddings, adapters]
            if self._embeddings.apply(embeddings):
                self._text.reload_tokenizers()
            self._text_loras.use_for_all(adapters)
            own = [replace(texts[index], adapters=adapters) for index in indices]
            encoded = self._text.encode(own, [self.forwards(text) for text in own])
            found |= zip(indices, encoded, strict=True)
        return [
            replace(found[index], adapters=self._denoiser_loras.effective(text.adapters))
            for index, text in enumerate(texts)
        ]

    def clear_cache(self) -> None:
        self._text.clear_cache()
        for loras in (self._text_loras, self._denoiser_loras):
            loras.clear_cache()

    def encode_images(self, images: Sequence[Pixels]) -> list[ImageLatents]:
        pixels = to_device(torch.from_numpy(np.stack(images)), self.device)
        mean, deviation = self._codec.encode(pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1)
        return [
            ImageLatents(mean[i], deviation[i] if deviation is not None else None)
            for i in range(len(images))
        ]

    def denoise(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        conditionings: Sequence[Conditioning],
    ) -> Sequence[Tensor]:
        rows = list(zip(latents, torch.split(timesteps, 1), conditionings, strict=True))
        # The guided rows are repeated after all rows, with their negative prompts.
        guided = [index for index, row in enumerate(conditionings) if row.negative is not None]
        forwards = [Forward(x, t, row.prompt, row) for x, t, row in rows]
        for index in guided:
            x, t, row = rows[index]
            assert row.negative is not None
            forwards.append(Forward(x, t, row.negative, row))
        count = len(forwards)
        order = self._denoiser_loras.use([forward.conditioning.adapters for forward in forwards])
        forwards = [forwards[index] for index in order]
        if self._is_compiled:
            admit_shapes()
            forwards += forwards[-1:] * (self.padded_batch_size(count) - count)
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        outputs = dict(zip(order, self._family.predict(self._model, forwards), strict=False))
        results = [outputs[index] for index in range(len(rows))]
        for place, index in enumerate(guided):
            scale, negative = conditionings[index].cfg_scale, outputs[len(rows) + place]
            results[index] = self._family.combine(results[index], negative, scale)
        return results

    def decode(self, latents: Tensor) -> Sequence[HostCopy]:
        images = self._codec.decode(latents)
        return copy_to_host(_pixels(images), torch.isfinite(images).flatten(1).all(1))

    def preview(self, latents: Tensor) -> Sequence[HostCopy]:
        if self._tiny is not None:
            return copy_to_host(_pixels(preview.shrink(self._tiny.decode(latents))))
        return copy_to_host(preview.project(latents, self._projection, self._codec.side_scale))

    @torch.inference_mode()
    def _encode_for_fit(self, images: Tensor) -> Tensor:
        with DEFAULT_DTYPE.normal():
            return self._codec.encode(images.to(self.device))[0].cpu()


def _pixels(images: Tensor) -> Tensor:
    """Converts images from about -1..1, n x 3 x h x w, to uint8, n x h x w x 3."""
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
