"""The interfaces to NATS: the work queue, the event log and the control channel."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from img2img_server.domain.events import Envelope, Event
from img2img_server.domain.job import Job
from img2img_server.domain.params import Lane


class OwnershipLostError(Exception):
    """Another writer has appended to the job's log: this writer no longer owns the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """One message of the work queue: which job to run, and its init image.

    The parameters of the job are in its record only.

    Attributes:
        init_image: An encoded PNG, JPEG or WebP that was proven to decode within the limits.
        init_image_prepared: The init image already has the requested size and needs decoding only.
        trace: W3C trace context of the call that created the job.
        permit: The permit of the record that the message belongs to; 0: any record of the job.
    """

    job_id: int
    tenant: str
    init_image: bytes
    init_image_prepared: bool = False
    trace: dict[str, str] = field(default_factory=dict)
    permit: int = 0

    def is_of(self, job: Job) -> bool:
        """Returns False if the call that queued the message has abandoned its record since."""
        return not self.permit or self.permit == job.permit

    def without_image(self) -> QueuedJob:
        """Returns the message without its image, for the dead letters."""
        return replace(self, init_image=b"")


# Tenants share the order of their jobs with other tenants only by accident: see `slot_of`.
SLOTS = 128
SIZES = 4
SIZE_STEP = 4


def slot_of(tenant: str) -> int:
    """Returns the slot of a tenant, from 0 to SLOTS - 1."""
    return zlib.crc32(tenant.encode()) % SLOTS


def size_of(work: float) -> int:
    """Returns the size class of a job, from 0 to SIZES - 1; shorter jobs have smaller classes.

    Args:
        work: the job's forwards, each counted as a share of one at the model's native size.
    """
    size, most = 0, float(SIZE_STEP)
    while work >= most and size < SIZES - 1:
        size, most = size + 1, most * SIZE_STEP
    return size


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSource:
    """Unfinished jobs of one model, lane, size class and slot. They are delivered in their order.

    Attributes:
        jobs: The number of unfinished jobs of each tenant, delivered ones included.
    """

    lane: Lane
    size: int
    slot: int
    jobs: Mapping[str, int]

    @property
    def key(self) -> tuple[Lane, int, int]:
        return self.lane, self.size, self.slot


class SourceOrder(Protocol):
    """Decides from which sources a worker pulls."""

    def order(self, sources: Sequence[QueueSource]) -> Sequence[QueueSource]:
        """Returns the sources from which to pull now, the first one first."""
        ...

    def note(self, empty: Sequence[QueueSource], taken: QueueSource | None) -> None:
        """Receives the outcome: the sources that had no waiting job, and the one that had."""
        ...


class InTurn:
    """The order of lanes, shorter jobs first."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = list(lanes)

    def order(self, sources: Sequence[QueueSource]) -> Sequence[QueueSource]:
        return sorted(sources, key=lambda each: (self._lanes.index(each.lane), each.size))

    def note(self, empty: Sequence[QueueSource], taken: QueueSource | None) -> None: ...


class Delivery(Protocol):
    """One delivered message. Exactly one of ack, nak or term ends it; in_progress keeps it."""

    @property
    def job(self) -> QueuedJob: ...

    @property
    def attempt(self) -> int:
        """Returns how often the message was delivered, from 1."""
        ...

    async def ack(self) -> None:
        """Removes the message of a job that has ended, and releases its permit."""
        ...

    async def nak(self) -> None:
        """Requeues the message at once."""
        ...

    async def term(self, reason: str) -> None:
        """Moves the message to the dead letters, without its init image; releases its permit."""
        ...

    async def in_progress(self) -> None:
        """Resets the redelivery timer. Call it every third of ack_wait."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLoad:
    """The jobs in one lane of one model.

    Attributes:
        waiting: Jobs that were never delivered.
        taken: Jobs that were delivered and have not ended, requeued ones included.
        last_taken: The highest place in the queue that was ever delivered; 0: none.
    """

    waiting: int
    taken: int
    last_taken: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLoad:
    """The jobs of one source; see LaneLoad for its numbers."""

    source: QueueSource
    waiting: int
    taken: int
    last_taken: int

    def waiting_of(self, tenant: str) -> int:
        """Returns how many waiting jobs the tenant has; an estimate if tenants share the slot."""
        jobs = self.source.jobs
        return round(self.waiting * jobs.get(tenant, 0) / max(1, sum(jobs.values())))


class JobQueue(Protocol):
    """Durable work queue by model, lane and tenant; each of these parts is bounded."""

    @property
    def ack_wait_seconds(self) -> float: ...

    async def put(self, job: QueuedJob, model: str, lane: Lane, size: int = 0) -> int:
        """Queues the job for workers of the model and returns its place: a growing number above 0.

        A job id is queued once with each permit: putting it again within 120 s returns the place
        that it got.

        `size`: the size class of the job, see `size_of`.

        Raises:
            QueueFullError: the tenant has its limit of unfinished jobs of this model, lane and
                size.
            UnavailableError: NATS is down.
        """
        ...

    async def remove(self, sequence: int) -> bool:
        """Removes a job that has not ended; returns False if it was removed already."""
        ...

    async def next_before(self, before: float, after: int = 0) -> tuple[int, QueuedJob] | None:
        """Returns the first job after a place that was queued before a time and has not ended, with
        its place and without its init image; None if there is none.

        Args:
            before: Unix time.
        """
        ...

    async def loads(self, model: str) -> list[SourceLoad]:
        """Returns the sources of a model that have unfinished jobs, with their numbers."""
        ...

    async def position(self, model: str, lane: Lane, sequence: int) -> int:
        """Returns how many jobs of the lane wait before place `sequence`; -1: unknown.

        An upper bound if several lanes and models share the queue.
        """
        ...

    async def depth(self, model: str, lane: Lane) -> int:
        """Returns how many jobs of the lane were never delivered."""
        ...

    async def load(self, model: str, lane: Lane) -> LaneLoad:
        """Returns the numbers of the lane with one request to NATS, whatever the number of jobs."""
        ...

    async def unfinished(self, tenant: str) -> int:
        """Returns the number of the tenant's jobs of all models and lanes, running ones included.

        Advisory: other jobs may be queued concurrently.
        """
        ...

    async def pull(
        self,
        model: str,
        lanes: Sequence[Lane],
        most: int,
        timeout_seconds: float,
        *,
        order: SourceOrder | None = None,
        is_idle: bool = True,
        interrupt: asyncio.Event | None = None,
    ) -> list[Delivery]:
        """Returns up to `most` jobs of one source; none if none came in time.

        Args:
            order: Chooses the sources; by default earlier lanes first, then shorter jobs.
            is_idle: The caller has no job that runs. Idle callers get new jobs first, and ask the
                holders of waiting jobs for one (`on_wanted`).
            interrupt: Ends the wait when it is set; the caller then decides again.
        """
        ...

    def on_wanted(
        self, model: str, handler: Callable[[], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` when an idle worker found no job. Of several listeners one is called.

        Enter it only while a job could be requeued.
        """
        ...


class Permits(Protocol):
    """One permit for each unfinished job. The number of a tenant's permits is bounded.

    A permit is taken before its job has a record, and released once the record has ended or was
    abandoned. A process that dies in between leaves its permit to `api.quota`. Every method raises
    UnavailableError when NATS is down.
    """

    async def take(self, tenant: str, job_id: int) -> int:
        """Takes a permit and returns its number, which is never used again.

        Raises:
            QueueFullError: the tenant has its limit of permits.
        """
        ...

    async def release(self, permit: int) -> None:
        """Releases a permit, if it was not released before."""
        ...

    async def count(self, tenant: str) -> int:
        """Returns the number of the tenant's permits."""
        ...

    async def oldest(self, tenant: str, most: int) -> list[tuple[int, int]]:
        """Returns the tenant's first permits, each with the id of its job."""
        ...


class EventWriter(Protocol):
    """Appends to one job's log, in order. A log has one writer; a second one takes it over."""

    @property
    def sequence(self) -> int:
        """Returns the number of the last event, 0 for an empty log."""
        ...

    @property
    def ended(self) -> bool:
        """Returns whether the log has its terminal event."""
        ...

    def continue_after(self, number: int) -> None:
        """Makes the next event have a number above `number`, also if the log was removed."""
        ...

    async def append(self, event: Event) -> Envelope:
        """Numbers and stores the event.

        Raises:
            OwnershipLostError: another writer has taken over.
        """
        ...


class EventLog(Protocol):
    """Numbered, replayable events of every job."""

    async def open(self, job_id: int, *, tenant: str = "", fresh: bool = False) -> EventWriter:
        """Takes over the log of a job; `fresh`: the log is known to be empty.

        The bytes of the log count for `tenant` once it has ended.
        """
        ...

    async def remove_expired(self) -> None:
        """Removes the logs of jobs that ended before the retention. Raises UnavailableError."""
        ...

    async def last_sequence(self, job_id: int) -> int:
        """Returns the number of the last event, 0 for an empty log. Its writer keeps the log."""
        ...

    def watch(
        self, job_id: int, after_sequence: int = 0, *, tenant: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[Envelope]]:
        """Replays the events after `after_sequence`, then follows the log without end.

        No event that is appended after the context is entered is missed.

        Args:
            tenant: The tenant whose share of the memory for events is used.
        """
        ...


class WorkerCommand(StrEnum):
    """A command to every worker.

    RESTART: requeue the running jobs and end, for a new process. CLEAR_CACHE: drop the caches.
    """

    RESTART = "restart"
    CLEAR_CACHE = "clear_cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCommand:
    """A command to one worker with a catalogue.

    Attributes:
        worker: The name under which the worker announces the model.
        loads: Load the model; False: unload it.
    """

    worker: str
    loads: bool


class StreamState(StrEnum):
    """A notice to the other apis about the streams of a job.

    `BROKEN`: its Generate call broke and the grace period has begun. `SOUGHT`: the grace period is
    over. An api that streams the job replies to both. `SETTLED`: an api streams the job, or has
    cancelled it; the grace period ends.
    """

    BROKEN = "broken"
    SOUGHT = "sought"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamNotice:
    """One api's message to all apis, itself included. `grace_seconds`: the remaining grace period,
    if BROKEN.
    """

    state: StreamState
    tenant: str
    job_id: int
    grace_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """The device seconds that a worker has spent on each tenant since its last report."""

    worker: str
    model: str
    seconds: dict[str, float]


class Control(Protocol):
    """Sends commands to every worker and notices to every api, at once. No message is stored."""

    async def cancel(self, job_id: int) -> None:
        """Asks the worker that runs the job to stop it at its next step."""
        ...

    def on_cancel(
        self, handler: Callable[[int], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with the id of every job to cancel."""
        ...

    async def broadcast(self, command: WorkerCommand) -> None:
        """Sends a command to every worker that listens now."""
        ...

    def on_command(
        self, handler: Callable[[WorkerCommand], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with every command."""
        ...

    async def command_model(self, command: ModelCommand) -> None:
        """Sends a command about a model to its worker, if it listens now."""
        ...

    def on_model_command(
        self, handler: Callable[[ModelCommand], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with every command about a model, of any worker."""
        ...

    async def notify(self, notice: StreamNotice) -> None:
        """Sends a notice to every api that listens now."""
        ...

    def on_notice(
        self, handler: Callable[[StreamNotice], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with every notice."""
        ...

    async def report_usage(self, report: UsageReport) -> None:
        """Sends a report to every worker that listens now, the sender included."""
        ...

    def on_usage(
        self, handler: Callable[[UsageReport], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with every report of device time."""
        ...
