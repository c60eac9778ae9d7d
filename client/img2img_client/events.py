"""What happens to a job, one dataclass a kind; see img2img/v1/event.proto."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from img2img_client.resources import Image, Job


class Stage(StrEnum):
    """Stages before denoising. UNSPECIFIED: one that this client does not know."""

    UNSPECIFIED = "unspecified"
    TEXT_ENCODED = "text_encoded"
    IMAGE_ENCODED = "image_encoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of a job's log. `sequence` counts from 1 within the job; missing numbers were
    previews that a later one replaced."""

    sequence: int
    event_time: datetime | None
    job_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Event):
    """The job when the stream began; its sequence is where the stream begins."""

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Event):
    """It waits. `position`: jobs before it, -1 when unknown. `eta_seconds`: until its end."""

    position: int
    eta_seconds: float | None
    requeue_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A worker took it for the attempt-th time; samples begin again from their first step."""

    worker: str
    model: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished(Event):
    """A stage before denoising is done."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished(Event):
    """Step `step` of `total` of one sample is done; `sigma` is its noise-to-signal ratio now."""

    sample: int
    step: int
    total: int
    sigma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview(Event):
    """A rough look at one sample after `step` steps: a JPEG of at most 256 pixels a side."""

    sample: int
    step: int
    image: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFinished(Event):
    """A picture is ready, not yet stored."""

    sample: int
    seed: int
    image: Image
    nsfw: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStored(Event):
    """A picture is completely stored behind `url`."""

    sample: int
    url: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded(Event):
    """Terminal: every picture is stored."""

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """Terminal: it could not be done; see `job.error`."""

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(Event):
    """Terminal: ended on request."""

    job: Job


TERMINAL = (Succeeded, Failed, Cancelled)
