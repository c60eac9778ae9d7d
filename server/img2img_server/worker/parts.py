"""What every run of a worker shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from img2img_server.domain.params import JobParams
from img2img_server.engine.base import Engine
from img2img_server.queue.base import EventLog, JobQueue
from img2img_server.safety.base import SafetyChecker
from img2img_server.store.base import BlobStore, JobStore

_BASE_PIXELS = 512 * 512
_WEIGHT = 0.2


class Pace:
    """Moving mean of the engine's seconds for one sample at 512x512; 0.0 before the first."""

    def __init__(self) -> None:
        self.job_seconds = 0.0

    def observe(self, params: JobParams, engine_seconds: float) -> None:
        """Takes one finished job into account."""
        work = params.samples * params.width * params.height / _BASE_PIXELS
        seconds = engine_seconds / work
        known = self.job_seconds or seconds
        self.job_seconds = known + _WEIGHT * (seconds - known)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The worker's seams and figures."""

    name: str
    engine: Engine
    queue: JobQueue
    events: EventLog
    jobs: JobStore
    blobs: BlobStore
    safety: SafetyChecker
    safety_threshold: float
    max_attempts: int
    pace: Pace = field(default_factory=Pace)
