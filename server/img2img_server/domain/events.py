"""The events of a job. An envelope numbers them from 1 within their job."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The stages of a job without its steps. The first two are finished for the whole job."""

    TEXT_ENCODED = "text_encoded"
    IMAGE_ENCODED = "image_encoded"
    IMAGE_DECODED = "image_decoded"
    SAFETY_CHECKED = "safety_checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An encoded image and the values to verify it."""

    data: bytes
    media_type: str
    sha256: str
    width: int
    height: int

    @property
    def size_bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The job waits. `position`: jobs before it, -1: unknown. `eta_seconds`: the time until the job
    ends.
    """

    position: int = -1
    eta_seconds: float | None = None
    requeue_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A worker started the job.

    Attributes:
        attempt: The number of the attempt, from 1.
        stored_samples: Indices of the samples that an earlier attempt has stored.
        pulled_time: Unix seconds when the worker pulled the job; 0.0: unknown.
        done_steps: For each sample, the steps that an earlier worker of the attempt has done and
            that do not run again; empty: the samples begin with their first step.
    """

    worker: str
    model: str
    attempt: int
    stored_samples: tuple[int, ...] = ()
    pulled_time: float = 0.0
    done_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    """A stage is done. `sample`: of this sample; None: for the whole job."""

    stage: Stage
    sample: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """Step `step` of `total` of one sample is done. `sigma`: the sample's ratio of noise to signal
    after the step.
    """

    sample: int
    step: int
    total: int
    sigma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A rough image of one sample; the next preview of the sample replaces it in the log."""

    sample: int
    step: int
    image: EncodedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFinished:
    """An image is ready and not stored yet."""

    sample: int
    seed: int
    image: EncodedImage
    nsfw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStored:
    """An image is completely stored behind `url`."""

    sample: int
    url: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageWaiting:
    """The file of an image waits until it can be stored. `reason`: a sentence for the caller."""

    sample: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded:
    """Terminal: every image is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Terminal: the job failed."""

    reason: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """Terminal: the job was cancelled."""


Event = (
    Queued
    | Started
    | StageFinished
    | StepFinished
    | Preview
    | SampleFinished
    | SampleStored
    | StorageWaiting
    | Succeeded
    | Failed
    | Cancelled
)
TERMINAL = (Succeeded, Failed, Cancelled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One entry of a job's log.

    Attributes:
        sequence: Number of the event within its job, from 1.
        time: Unix seconds.
        previous: Number of the event before that is no preview, 0 if there is none. -1: a writer of
            an older version did not say.
    """

    sequence: int
    time: float
    job_id: int
    event: Event
    previous: int = -1

    @property
    def is_terminal(self) -> bool:
        return isinstance(self.event, TERMINAL)
