"""A job's events: one dataclass for each kind; see img2img/v1/event.proto."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from img2img_client.resources import Image, Job


class Stage(StrEnum):
    """Stages without the denoising steps. UNSPECIFIED: one that this client does not know."""

    UNSPECIFIED = "unspecified"
    TEXT_ENCODED = "text_encoded"
    IMAGE_ENCODED = "image_encoded"
    IMAGE_DECODED = "image_decoded"
    SAFETY_CHECKED = "safety_checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event of a job. `sequence` counts from 1 within the job; missing numbers were previews
    that a later preview replaced. `missing_from`: the number of the first event that the service
    removed before it could send it, 0 if there is none between the event before and this one."""

    sequence: int
    event_time: datetime | None
    job_name: str
    missing_from: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Event):
    """The job's record when the stream began; the events after `sequence` follow. Repeated if a
    queued job waits for another reason, see `job.state_reason` and `job.warning`.
    """

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Event):
    """The job waits. `position`: jobs ahead, -1: unknown. `eta_seconds`: time until it ends."""

    position: int
    eta_seconds: float | None
    requeue_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A worker started the job; `attempt` counts from 1. All samples start at their first step,
    except `stored_samples`: an earlier attempt has stored them. `done_steps`: steps of each sample
    that another worker has finished in this attempt; empty if there are none."""

    worker: str
    model: str
    attempt: int
    stored_samples: tuple[int, ...] = ()
    done_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished(Event):
    """A stage has finished. `sample`: of this sample; None: for the whole job."""

    stage: Stage
    sample: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished(Event):
    """Step `step` of `total` of a sample has finished; `sigma` is its noise-to-signal ratio."""

    sample: int
    step: int
    total: int
    sigma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview(Event):
    """A preview of one sample after `step` steps: a JPEG of at most 256 pixels a side."""

    sample: int
    step: int
    image: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFinished(Event):
    """An image is ready but not yet stored."""

    sample: int
    seed: int
    image: Image
    nsfw: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStored(Event):
    """An image is stored; `url` is its link."""

    sample: int
    url: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageWaiting(Event):
    """The file of a finished image waits for the service's object store, which cannot be used now.
    The job continues by itself. `reason`: a sentence for people."""

    sample: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """Base class of the terminal events, with the job's final record."""

    job: Job


class Succeeded(Ended):
    """Terminal: all images are stored."""


class Failed(Ended):
    """Terminal: the job failed; see `job.error`."""


class Cancelled(Ended):
    """Terminal: the job was cancelled."""
