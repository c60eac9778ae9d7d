"""The dependencies that all jobs of a worker share, and its measured speed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from img2img_server.domain.job import Timings
from img2img_server.domain.params import JobParams
from img2img_server.engine.base import Engine
from img2img_server.imaging.decoder import ImageDecoder, ThreadDecoder
from img2img_server.interfaces.queue import EventLog, JobQueue
from img2img_server.interfaces.records import JobStore
from img2img_server.interfaces.states import JobStates
from img2img_server.interfaces.webhooks import WebhookOutbox
from img2img_server.nats.tenant_settings import TenantStorage
from img2img_server.nats.usage import UsageLedger
from img2img_server.safety.base import SafetyChecker
from img2img_server.storage.tenant_s3 import TenantS3
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.worker.dispatch import Dispatcher
from img2img_server.worker.usage import FleetUsage

_BASE_PIXELS = 512 * 512
_WEIGHT = 0.2


def _moved(known: float, seconds: float) -> float:
    """Returns the moving mean after a measurement; 0.0 is no mean."""
    return (known or seconds) + _WEIGHT * (seconds - (known or seconds))


class Throughput:
    """Moving means of the speed of this worker; 0.0 before the first measurement.

    Attributes:
        job_seconds: The engine's seconds for one sample at 512x512, including the wait for the
            device.
        pixel_step_seconds: The device's seconds for one pixel-step, which is less if jobs share
            batches.
        forward_seconds: The device's seconds for a forward at the model's native size.
        job_forward_seconds: The same as its job sees it: the seconds of encoding, steps and
            decoding, without pauses.
        busy: Share of the time between the last two measurements in which the device worked.
    """

    def __init__(self) -> None:
        self.job_seconds = 0.0
        self.pixel_step_seconds = 0.0
        self.forward_seconds = 0.0
        self.job_forward_seconds = 0.0
        self.busy = 0.0
        self._seen_busy_seconds: float | None = None
        self._measured_at = 0.0
        self._busy_seconds = 0.0
        self._pixel_steps = 0.0
        self._forwards = 0.0

    def observe(self, params: JobParams, timings: Timings, work: float) -> None:
        """Adds a finished job.

        Args:
            work: the job's forwards at the model's native size.
        """
        size = params.samples * params.width * params.height / _BASE_PIXELS
        self.job_seconds = _moved(self.job_seconds, timings.engine / size)
        if work:
            seconds = timings.encode + timings.denoise + timings.decode
            self.job_forward_seconds = _moved(self.job_forward_seconds, seconds / work)

    def restart(self) -> None:
        """Notes that the next measurements are those of a new engine. Keeps the means."""
        self._seen_busy_seconds = None
        self.busy = 0.0

    def count_step(self, params: JobParams, forwards: float = 1.0) -> None:
        """Counts one step of one sample. `forwards`: its forwards at the model's native size."""
        self._pixel_steps += params.width * params.height
        self._forwards += forwards

    def add_busy_seconds(self, busy_seconds: float, now: float) -> None:
        """Adds the device's work since the last call to pixel_step_seconds and busy.

        Args:
            busy_seconds: the seconds that the device has worked since its start.
            now: monotonic seconds.
        """
        seen, self._seen_busy_seconds = self._seen_busy_seconds, busy_seconds
        passed, self._measured_at = now - self._measured_at, now
        if seen is None:  # Work before the first call does not count.
            return
        self.busy = min(1.0, (busy_seconds - seen) / passed) if passed > 0 else 0.0
        if busy_seconds == seen:
            return
        self._busy_seconds += busy_seconds - seen
        if self._pixel_steps:
            self.pixel_step_seconds = self._busy_seconds / self._pixel_steps
            self.forward_seconds = self._busy_seconds / self._forwards
            # Both sums decay at the same rate, so recent measurements weigh more.
            self._busy_seconds *= 1 - _WEIGHT
            self._pixel_steps *= 1 - _WEIGHT
            self._forwards *= 1 - _WEIGHT


@dataclass(frozen=True, kw_only=True)
class WorkerDeps:
    """The interfaces, settings and measurements that the worker and its jobs use."""

    name: str
    engine: Engine
    queue: JobQueue
    events: EventLog
    jobs: JobStore
    blobs: WatchedBlobs
    outbox: WebhookOutbox
    ledger: UsageLedger
    states: JobStates
    storage: TenantStorage
    tenant_s3: TenantS3
    safety: SafetyChecker
    safety_threshold: float
    max_attempts: int
    retention_hours: int
    usage: FleetUsage
    dispatcher: Dispatcher
    rank: int | None = None  # the model's place in the worker's catalogue; None: it has none
    # Tests whether NATS stores messages.
    probe: Callable[[], Awaitable[None]]
    # Deletes cached downloads of the model and returns the bytes freed. Blocks. Raises OSError.
    forget_downloads: Callable[[], int] = lambda: 0
    decoder: ImageDecoder = field(default_factory=ThreadDecoder)
    throughput: Throughput = field(default_factory=Throughput)
    device_lost: asyncio.Event = field(default_factory=asyncio.Event)
