"""The interface between the step loop and a model. It uses tensors, but no diffusers.

Latents are float32, n x channels x height x width of the autoencoder's latents, on the model's
device, scaled as the sampler expects them. Only the model's family knows the meaning of the tensors
of a conditioning.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from img2img_server.domain.job import Determinism
from img2img_server.domain.strength import StrengthMode
from img2img_server.engine.sampler import Schedule
from img2img_server.imaging.base import Pixels


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA of the model and its scale.

    Attributes:
        content: The content of the file when the adapter was made, so that a file that is replaced
            or deleted does not change running jobs. Equal for equal files; None: there is no file.
    """

    name: str
    scale: float
    content: Hashable = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The textual inversion embeddings that prompts may name at one moment.

    Attributes:
        key: Equal for equal files.
    """

    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextInput:
    """The text input of one job.

    Attributes:
        embeddings: `Denoiser.current_embeddings` when the job began, so that a file that is
            replaced or deleted does not change it; None: those of the present files.
    """

    prompt: str
    negative_prompt: str
    guidance_scale: float
    height: int
    width: int
    true_cfg_scale: float | None = None
    prompt_weights: bool = False
    clip_skip: int = 0
    adapters: tuple[Adapter, ...] = ()
    embeddings: Embeddings | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TextEmbedding:
    """An encoded prompt.

    Attributes:
        tensors: The tensors of the family, by name, without a batch dimension.
        warning: A sentence about the part of the prompt that was not encoded.
    """

    tensors: Mapping[str, Tensor]
    warning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """The conditioning of the rows of one job, on the device.

    Attributes:
        negative: None for rows that need no second forward.
        guidance_scale: A tensor of one number.
        cfg_scale: The scale of classifier-free guidance, a tensor of one number.
        extras: Further inputs of the family, by name, with a batch dimension of 1.
    """

    prompt: TextEmbedding
    negative: TextEmbedding | None
    guidance_scale: Tensor
    cfg_scale: Tensor
    adapters: tuple[Adapter, ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Returns a sentence for each prompt of the job that was not encoded completely."""
        texts = (self.prompt, self.negative) if self.negative else (self.prompt,)
        return tuple(text.warning for text in texts if text.warning)


@dataclass(frozen=True, slots=True, eq=False)
class ImageLatents:
    """An encoded init image: channels x height x width of its latents.

    `deviation`: the standard deviation of the autoencoder's output, sampled once for each row;
    None: its output is deterministic.
    """

    mean: Tensor
    deviation: Tensor | None = None


class DeviceImage(Protocol):
    """An image that the device computes: height x width x 3."""

    @property
    def is_ready(self) -> bool:
        """Returns whether `pixels` returns without waiting."""
        ...

    def pixels(self) -> Pixels:
        """Waits for the image, on any thread.

        Raises:
            EngineError: the image has values that are not finite.
            Exception: an error of the device.
        """
        ...


class Denoiser(Protocol):
    """A model on a device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def device_name(self) -> str:
        """Returns the name for people: "cpu" or "NVIDIA H100 80GB HBM3"."""
        ...

    @property
    def state_key(self) -> str:
        """Returns a key that denoisers share if they compute the same; see Engine.state_key."""
        ...

    @property
    def current_embeddings(self) -> Embeddings:
        """Returns the embeddings of the present files."""
        ...

    @property
    def determinism(self) -> Determinism:
        """Returns how equal the images of a repeated request are, in any batches."""
        ...

    def forwards(self, text: TextInput) -> int:
        """Returns how many forwards a step of a row costs: 2 with guidance that needs them."""
        ...

    def batch_key(self, text: TextInput) -> Hashable:
        """Returns the key that rows of one forward must share: in most families, their size."""
        ...

    @property
    def fixed_step_cost(self) -> int | None:
        """Returns the cost of a step in addition to the cost of its rows, in pixels x forwards.
        None: a larger batch is always worthwhile.
        """
        ...

    def padded_batch_size(self, forwards: int) -> int:
        """Returns the number of forwards that run for a batch of this size. It is larger if only a
        few sizes are compiled.
        """
        ...

    @property
    def warm_up_forwards(self) -> tuple[int, ...]:
        """Returns the batch sizes, in forwards, that a warm-up runs at every image size."""
        ...

    @property
    def warm_up_prompts(self) -> tuple[str, ...]:
        """Returns prompts for the warm-up. Each runs alone, and in batches with the first one.

        There are several prompts if the compiled code depends on the lengths of prompts.
        """
        ...

    @property
    def warm_up_calls(self) -> int:
        """Returns how often a warm-up runs each batch size until everything is compiled."""
        ...

    def max_vae_batch(self, height: int, width: int) -> int:
        """Returns how many images of a size to encode or decode together, at least 1."""
        ...

    def schedule(
        self,
        name: str,
        num_inference_steps: int,
        strength: float,
        height: int,
        width: int,
        mode: StrengthMode = StrengthMode.STEPS,
    ) -> Schedule:
        """Returns the coefficients of the sampler.

        Raises:
            ValueError: The scheduler cannot run this number of steps.
        """
        ...

    def adapter(self, name: str, scale: float) -> Adapter:
        """Returns the adapter with the present content of the file; any thread may call it."""
        ...

    def adapter_key(self, adapters: tuple[Adapter, ...]) -> Hashable:
        """Returns the key that rows of one forward must share because of their adapters."""
        ...

    def encode_texts(self, texts: Sequence[TextInput]) -> list[Conditioning]:
        """Encodes prompts. Recently encoded prompts come from a cache."""
        ...

    def clear_cache(self) -> None:
        """Drops the cached prompts."""
        ...

    def encode_images(self, images: Sequence[Pixels]) -> list[ImageLatents]:
        """Encodes init images of one size."""
        ...

    def denoise(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        conditionings: Sequence[Conditioning],
    ) -> Sequence[Tensor]:
        """Returns the model's output for every row, guidance applied: 1 x c x h x w, float32.

        Args:
            latents: A tensor of 1 x c x h x w a row.
            timesteps: One number a row.
        """
        ...

    def decode(self, latents: Tensor) -> Sequence[DeviceImage]:
        """Starts to decode images, without waiting for the device."""
        ...

    def preview(self, latents: Tensor) -> Sequence[DeviceImage]:
        """Starts to make previews of at most 256 pixels on the longer side, with little work."""
        ...
