"""What happens to a job. The envelope numbers events from 1 within their job."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """Stages before denoising."""

    TEXT_ENCODED = "text_encoded"
    IMAGE_ENCODED = "image_encoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A picture as a file: its bytes and what is needed to check them."""

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
    """It waits. `position`: jobs before it, -1 when unknown. `eta_seconds`: until its end."""

    position: int = -1
    eta_seconds: float | None = None
    requeue_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A worker took it for the attempt-th time."""

    worker: str
    model: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    """A stage before denoising is done."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """Step `step` of `total` of one sample is done; `sigma` is its noise-to-signal ratio now."""

    sample: int
    step: int
    total: int
    sigma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A rough look at one sample; a later one replaces it in the log."""

    sample: int
    step: int
    image: EncodedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFinished:
    """A picture is ready, not yet stored."""

    sample: int
    seed: int
    image: EncodedImage
    nsfw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStored:
    """A picture is completely stored behind `url`."""

    sample: int
    url: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded:
    """Terminal: every picture is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Terminal: it could not be done."""

    reason: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """Terminal: ended on request."""


Event = (
    Queued
    | Started
    | StageFinished
    | StepFinished
    | Preview
    | SampleFinished
    | SampleStored
    | Succeeded
    | Failed
    | Cancelled
)
TERMINAL = (Succeeded, Failed, Cancelled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One entry of a job's log. `sequence` counts from 1; `time`: Unix seconds."""

    sequence: int
    time: float
    job_id: int
    event: Event

    @property
    def is_terminal(self) -> bool:
        return isinstance(self.event, TERMINAL)
