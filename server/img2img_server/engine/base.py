"""The interface between the worker and the engine: jobs, events, the Engine. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from img2img_server.domain.events import StageFinished, StepFinished
from img2img_server.domain.job import Determinism, Timings
from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import JobParams
from img2img_server.domain.stages import Span
from img2img_server.imaging.base import Pixels

_CUT_SHOWN_CHARACTERS = 40
RESTARTED_WARNING = (
    "The worker of the job stopped, and another one started the job again from its first step."
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JobPlan:
    """A job as far as the order of jobs depends on it.

    Attributes:
        params: The parameters from the job's record; every default is filled in.
        enqueue_time: Monotonic seconds, by which waiting jobs are ordered; 0.0: the time of
            `submit`.
        deadline: Monotonic seconds after which the images are of no use; None: never.
        stored: Indices of samples that an earlier attempt has stored; they are not generated.
    """

    job_id: int
    tenant: str
    params: JobParams
    enqueue_time: float = 0.0
    deadline: float | None = None
    stored: frozenset[int] = frozenset()

    @property
    def indices(self) -> tuple[int, ...]:
        """The indices of the samples to generate."""
        return tuple(index for index in range(self.params.samples) if index not in self.stored)

    @property
    def height(self) -> int:
        return self.params.height

    @property
    def width(self) -> int:
        return self.params.width


class StateError(Exception):
    """A job cannot continue from its state. The message says why, as a clause about the state."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JobState:
    """The state of a suspended job, from which an engine with the same key continues.

    Attributes:
        state_key: Engine.state_key of the engine that suspended the job.
        steps: For each sample that is not finished, by its index: the steps that are done.
        total: The steps that run for each sample.
        tensors: The state of these samples, in the format of safetensors.
        finished_steps: The steps of the samples that are finished.
        device_seconds: Time of the device that the job has used.
        shares, batches: Sum of the shares of the batches that the job was in, and their number.
    """

    state_key: str
    job_id: int
    tenant: str
    steps: dict[int, int]
    total: int
    tensors: bytes
    finished_steps: int = 0
    device_seconds: float = 0.0
    shares: float = 0.0
    batches: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineJob(JobPlan):
    """The engine's request to run one job.

    A strength at which no step runs returns the init image, where stock diffusers raises.

    Attributes:
        init_image: The prepared init image, exactly height x width x 3.
        state: Continue from this state. If that is impossible, the job starts at its first step
            with a warning.
    """

    init_image: Pixels
    state: JobState | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each sample."""
        return tuple(self.params.sample_seed(index) for index in range(self.params.samples))

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


@dataclass(frozen=True, slots=True, eq=False)
class PreviewReady:
    """A rough image of one sample, at most 256 pixels on its longer side."""

    sample: int
    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True, eq=False)
class SampleReady:
    """A finished image, height x width x 3."""

    sample: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class JobDone:
    """The last event of a job that ran to its end.

    Attributes:
        timings: The stages of the engine; `engine`: from the first encoding to the last decoding.
        spans: When the engine encoded, denoised and decoded, and when it paused the job between.
        warnings: Sentences for Job.warning.
        denoising_steps: Steps that ran for each sample.
        start_noise: Share of noise that the first step began with, 0 to 1.
        device_seconds: Time of the device that the job used.
    """

    timings: Timings = field(default_factory=Timings)
    warnings: tuple[str, ...] = ()
    denoising_steps: int = 0
    start_noise: float = 0.0
    device_seconds: float = 0.0
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class JobStopped:
    """Last event of a job that was cancelled, or suspended before it had a state."""


@dataclass(frozen=True, slots=True, eq=False)
class JobSuspended:
    """Last event of a job that was suspended. All finished samples were emitted before.

    Attributes:
        state: That of EngineJob if the job has not continued from it.
        spans, engine_seconds: As in JobDone and its timings, of this engine only.
    """

    state: JobState
    spans: tuple[Span, ...] = ()
    engine_seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class JobFailed:
    """Last event of a job that failed; its neighbours continue.

    `error`: a JobFailedError, or another exception that was raised.
    """

    error: Exception


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLost:
    """The last event of the job in whose step, or at whose start, the device broke permanently.

    No engine of this process can use the device any more. The other jobs get JobStopped, or
    JobSuspended if they have not continued from their states.
    """

    error: Exception


EngineEvent = (
    StageFinished
    | StepFinished
    | PreviewReady
    | SampleReady
    | JobDone
    | JobStopped
    | JobSuspended
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
    def state_key(self) -> str:
        """Engines with the same key continue each other's jobs and make the same images. It depends
        on the weights, the options and number formats, the libraries and the kind of device.
        """
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds that the device has worked since the start; grows step by step."""
        ...

    def submit(self, job: EngineJob, sink: Sink) -> None:
        """Adds a job. `sink` gets the events in order, on threads of the engine; it must not block.

        Raises:
            EngineError: the engine is stopped.
        """
        ...

    def next_jobs(self, plans: Sequence[JobPlan]) -> Collection[int]:
        """Returns the ids of the jobs that would take part in the next step if the planned jobs
        were added to those of the engine now. Rows that end at once count no more.
        """
        ...

    def cancel(self, job_id: int) -> None:
        """Ends the job at the next step boundary with JobStopped. Ignores unknown jobs."""
        ...

    def suspend(self, job_id: int) -> None:
        """Ends the job at the next step boundary with JobSuspended, or with JobStopped if no step
        of it began and it has no state to continue from. Ignores unknown jobs and those whose steps
        are all done.
        """
        ...

    def clear_cache(self) -> None:
        """Drops the encoded prompts that are cached, at the next step boundary."""
        ...

    def stop(self) -> None:
        """Ends the thread at the next step boundary; running jobs get JobStopped, or JobSuspended
        if they have not continued from their states. Blocks."""
        ...
