"""The seam between the worker and the engine: what goes in, what comes out. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from img2img_server.domain.events import Stage
from img2img_server.domain.job import Determinism
from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import Lane

_CUT_SHOWN_CHARACTERS = 40
Pixels = npt.NDArray[np.uint8]  # height x width x 3, RGB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineJob:
    """One job as the engine takes it: everything settled, the init image prepared.

    `init_image`: exactly height x width x 3. `seeds`: one a sample. `guidance_scale` at most 1
    turns guidance off. A `strength` of less than one step gives the init image back, where stock
    diffusers raises. `enqueue_time`: monotonic seconds, orders waiting jobs;
    0.0 means when it is submitted. `lora`: one of the model's, empty for none; `lora_scale`: how
    much of it. `deadline`: monotonic seconds, when the pictures are of no more use.
    """

    job_id: int
    tenant: str
    lane: Lane
    prompt: str
    negative_prompt: str
    init_image: Pixels
    strength: float
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    preview_interval_steps: int = 0
    enqueue_time: float = 0.0
    lora: str = ""
    lora_scale: float = 1.0
    deadline: float | None = None

    @property
    def height(self) -> int:
        return int(self.init_image.shape[0])

    @property
    def width(self) -> int:
        return int(self.init_image.shape[1])


def cut_warning(field_name: str, kept: int, tokens: int, rest: str) -> str:
    """Returns the sentence about a prompt of which the text encoder reads the beginning only.

    Args:
        kept: tokens that it reads, of the prompt's `tokens`.
        rest: the text that it does not read.
    """
    words = " ".join(rest.split())
    if len(words) > _CUT_SHOWN_CHARACTERS:
        words = words[:_CUT_SHOWN_CHARACTERS].rstrip() + "…"
    return (
        f"The {field_name} was cut after {kept} of {tokens} tokens; the words from '{words}' on "
        "have no effect."
    )


@dataclass(frozen=True, slots=True)
class StageDone:
    """A stage before denoising is done for the whole job."""

    stage: Stage


@dataclass(frozen=True, slots=True)
class StepDone:
    """Step `step` of `total` of one sample is done; `sigma`: noise-to-signal ratio now."""

    sample: int
    step: int
    total: int
    sigma: float


@dataclass(frozen=True, slots=True, eq=False)
class PreviewReady:
    """A rough look at one sample, at most 256 pixels on its longer side."""

    sample: int
    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True, eq=False)
class SampleReady:
    """A finished picture, height x width x 3."""

    sample: int
    pixels: Pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimings:
    """Seconds the job spent by stage, and `engine` from its first encode to its last decode."""

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    engine: float = 0.0
    steps: int = 0
    batch_share: float = 0.0


@dataclass(frozen=True, slots=True)
class JobDone:
    """Last event of a job that ran to its end. `warnings`: sentences for Job.warning."""

    timings: EngineTimings = field(default_factory=EngineTimings)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobStopped:
    """Last event of a job that was cancelled."""


@dataclass(frozen=True, slots=True, eq=False)
class JobFailed:
    """Last event of a job that failed; its neighbours go on.

    `error`: a JobFailedError, or what else was raised.
    """

    error: Exception


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLost:
    """Last event of a job in whose step, or at whose start, the device is broken for good: no
    engine of this process can use it any more. Jobs beside it get JobStopped."""

    error: Exception


EngineEvent = (
    StageDone
    | StepDone
    | PreviewReady
    | SampleReady
    | JobDone
    | JobStopped
    | JobFailed
    | DeviceLost
)
Sink = Callable[[EngineEvent], None]


class Engine(Protocol):
    """Runs jobs on one device. Its methods may be called from any thread and do not block."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def device(self) -> str:
        """Name of the device, for example "cpu" or "NVIDIA H100 80GB HBM3"."""
        ...

    @property
    def determinism(self) -> Determinism: ...

    @property
    def max_batch_size(self) -> int:
        """Largest batch of a denoising step, in forwards: a sample costs one, with guidance two."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Time that the device has worked since the start; grows step by step."""
        ...

    def submit(self, job: EngineJob, sink: Sink) -> None:
        """Adds a job. `sink` gets its events in order, on threads of the engine; it must not block.

        Raises:
            EngineError: the engine is stopped.
        """
        ...

    def cancel(self, job_id: int) -> None:
        """Ends the job at the next step boundary; its sink then gets JobStopped. Unknown: no-op."""
        ...

    def clear_cache(self) -> None:
        """Forgets, at the next step boundary, what is kept for speed only: encoded prompts."""
        ...

    def stop(self) -> None:
        """Ends the thread at the next step boundary; running jobs get JobStopped. Blocks."""
        ...
