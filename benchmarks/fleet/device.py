"""A model whose computations are sleeps of a stated length, for the real engine."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from img2img_server.domain.job import Determinism
from img2img_server.domain.strength import StrengthMode, StrengthRule
from img2img_server.engine.denoiser import (
    Adapter,
    Conditioning,
    DeviceImage,
    Embeddings,
    ImageLatents,
    TextEmbedding,
    TextInput,
)
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.host_copy import HostCopy
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.engine.sampler import Schedule, Step
from img2img_server.imaging.base import Pixels

MODEL = "simulated"
MAX_BATCH_SIZE = 8
_BASE_PIXELS = 256 * 256


@dataclass(frozen=True)
class Costs:
    """The length of a step: `fixed_seconds`, and `row_seconds` for each forward of 256x256 pixels.

    Attributes:
        batches_pay: A larger batch is always worthwhile, as on a GPU; otherwise one row runs.
    """

    name: str
    fixed_seconds: float
    row_seconds: float
    batches_pay: bool

    def step_seconds(self, side: int = 256) -> float:
        """Returns the seconds of a step of one row."""
        return self.fixed_seconds + self.row_seconds * side * side / _BASE_PIXELS


ONE_ROW = Costs("one row at a time", 0.0, 0.05, batches_pay=False)
BATCHES = Costs("batches of 8", 0.02, 0.00125, batches_pay=True)


class SleepingDenoiser:
    """A Denoiser without a model. Images are grey."""

    device = torch.device("cpu")
    device_name = "simulated"
    determinism = Determinism.EXACT
    warm_up_forwards = (1,)
    warm_up_prompts = ("",)
    warm_up_calls = 1

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    @property
    def state_key(self) -> str:
        return "sleeping"

    @property
    def current_embeddings(self) -> Embeddings:
        return Embeddings()

    @property
    def fixed_step_cost(self) -> int | None:
        return None if self._costs.batches_pay else 0

    def forwards(self, text: TextInput) -> int:
        return 2 if text.guidance_scale > 1 else 1

    def batch_key(self, text: TextInput) -> Hashable:
        return text.height, text.width

    def padded_batch_size(self, forwards: int) -> int:
        return forwards

    def max_vae_batch(self, height: int, width: int) -> int:
        return MAX_BATCH_SIZE

    def schedule(
        self,
        name: str,
        num_inference_steps: int,
        strength: float,
        height: int,
        width: int,
        mode: StrengthMode = StrengthMode.STEPS,
    ) -> Schedule:
        step = Step(
            timestep=1.0,
            input_scale=1.0,
            slots=((1.0, 0.0, 0.0),),
            clean=(1.0, 0.0, 0.0),
            draws_noise=False,
            sigma_after=0.0,
        )
        steps = StrengthRule.FLOOR.denoising_steps(strength, num_inference_steps)
        return Schedule(init_signal=1.0, init_noise=0.0, steps=(step,) * steps)

    def adapter_key(self, adapters: tuple[Adapter, ...]) -> Hashable:
        return adapters

    def adapter(self, name: str, scale: float) -> Adapter:
        return Adapter(name, scale)

    def encode_texts(self, texts: Sequence[TextInput]) -> list[Conditioning]:
        one = torch.ones(1)
        embedding = TextEmbedding({})
        return [
            Conditioning(prompt=embedding, negative=None, guidance_scale=one, cfg_scale=one)
            for _ in texts
        ]

    def clear_cache(self) -> None: ...

    def encode_images(self, images: Sequence[Pixels]) -> list[ImageLatents]:
        return [
            ImageLatents(torch.zeros(1, image.shape[0] // 8, image.shape[1] // 8))
            for image in images
        ]

    def denoise(
        self, latents: Sequence[Tensor], timesteps: Tensor, conditionings: Sequence[Conditioning]
    ) -> Sequence[Tensor]:
        pixels = sum(64 * row.shape[2] * row.shape[3] for row in latents)
        seconds = self._costs.fixed_seconds + self._costs.row_seconds * pixels / _BASE_PIXELS
        time.sleep(seconds)
        return [torch.zeros_like(row) for row in latents]

    def decode(self, latents: Tensor) -> Sequence[DeviceImage]:
        height, width = 8 * latents.shape[2], 8 * latents.shape[3]
        grey = torch.full((height, width, 3), 128, dtype=torch.uint8)
        return [HostCopy(grey.clone(), None, None) for _ in range(latents.shape[0])]

    def preview(self, latents: Tensor) -> Sequence[DeviceImage]:
        return self.decode(latents)


def simulated_engine(costs: Costs) -> DiffusionEngine:
    """Returns a running engine on a simulated device."""
    spec = ModelSpec(
        source="", name=MODEL, num_inference_steps=20, guidance_scale=1.0, native_size=256
    )
    return DiffusionEngine(SleepingDenoiser(costs), spec, MAX_BATCH_SIZE)
