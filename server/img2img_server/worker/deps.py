"""What every run of a worker shares."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from img2img_server.domain.params import JobParams
from img2img_server.engine.base import Engine
from img2img_server.interfaces.queue import EventLog, JobQueue
from img2img_server.interfaces.records import JobStore
from img2img_server.interfaces.webhooks import WebhookOutbox
from img2img_server.nats.tenant_settings import TenantStorage
from img2img_server.safety.base import SafetyChecker
from img2img_server.storage.tenant_s3 import TenantS3
from img2img_server.storage.watched_blobs import WatchedBlobs

_BASE_PIXELS = 512 * 512
_WEIGHT = 0.2


class Throughput:
    """Moving means of what this worker measures; 0.0 before the first.

    `job_seconds`: the engine's seconds for one sample at 512x512, as its caller waits for it.
    `pixel_step_seconds`: the device's seconds for one pixel-step, which is less where jobs share
    their batches.
    """

    def __init__(self) -> None:
        self.job_seconds = 0.0
        self.pixel_step_seconds = 0.0
        self._seen_busy_seconds: float | None = None
        self._busy_seconds = 0.0
        self._pixel_steps = 0.0

    def observe(self, params: JobParams, engine_seconds: float) -> None:
        """Takes one finished job into account."""
        work = params.samples * params.width * params.height / _BASE_PIXELS
        seconds = engine_seconds / work
        known = self.job_seconds or seconds
        self.job_seconds = known + _WEIGHT * (seconds - known)

    def step(self, params: JobParams) -> None:
        """Counts one step of one sample."""
        self._pixel_steps += params.width * params.height

    def device_worked(self, busy_seconds: float) -> None:
        """Takes into account what the device worked since the call before.

        Args:
            busy_seconds: that it has worked since its start.
        """
        seen, self._seen_busy_seconds = self._seen_busy_seconds, busy_seconds
        if seen is None or busy_seconds == seen:  # not what it did before we counted, nor pauses
            return
        self._busy_seconds += busy_seconds - seen
        if self._pixel_steps:
            self.pixel_step_seconds = self._busy_seconds / self._pixel_steps
            # Both sums fade alike: what was measured lately counts more.
            self._busy_seconds *= 1 - _WEIGHT
            self._pixel_steps *= 1 - _WEIGHT


class Utilization:
    """How busy the engine's device was between two looks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._looked_at = 0.0
        self._busy_seconds = engine.busy_seconds

    def measure(self, now: float) -> float:
        """Share of the time since the last look in which the device worked, 0 to 1.

        Args:
            now: monotonic seconds.
        """
        busy_seconds = self._engine.busy_seconds
        passed, busy = now - self._looked_at, busy_seconds - self._busy_seconds
        self._looked_at, self._busy_seconds = now, busy_seconds
        return min(1.0, busy / passed) if passed > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class WorkerDeps:
    """The worker's seams and figures."""

    name: str
    engine: Engine
    queue: JobQueue
    events: EventLog
    jobs: JobStore
    blobs: WatchedBlobs
    outbox: WebhookOutbox
    storage: TenantStorage
    tenant_s3: TenantS3
    safety: SafetyChecker
    safety_threshold: float
    max_attempts: int
    retention_hours: int
    # Deletes cached downloads of the model, returns the bytes freed; blocks. Raises OSError.
    forget_downloads: Callable[[], int] = lambda: 0
    pace: Throughput = field(default_factory=Throughput)
    device_lost: asyncio.Event = field(default_factory=asyncio.Event)
