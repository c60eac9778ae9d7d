"""The seams to the bus: the work queue, the event log and the control channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from img2img_server.domain.events import Envelope, Event
from img2img_server.domain.params import Lane


class OwnershipLostError(Exception):
    """Another writer has appended to the job's log: this one no longer owns the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """One message of the work queue: which job to run, and its init image.

    The parameters of the job are in its record only.

    Attributes:
        init_image: An encoded PNG, JPEG or WebP that was proven to decode within the limits.
        init_image_prepared: The init image already has the requested size and needs decoding only.
        trace: W3C trace context of the call that created the job.
    """

    job_id: int
    tenant: str
    init_image: bytes
    init_image_prepared: bool = False
    trace: dict[str, str] = field(default_factory=dict)

    def without_image(self) -> QueuedJob:
        """Returns the message as the dead letters keep it."""
        return replace(self, init_image=b"")


class Delivery(Protocol):
    """One taken message. Exactly one of ack, nak or term ends it; until then keep it alive."""

    @property
    def job(self) -> QueuedJob: ...

    @property
    def attempt(self) -> int:
        """Times the message was delivered, from 1."""
        ...

    async def ack(self) -> None:
        """Done, result stored: removes it."""
        ...

    async def nak(self) -> None:
        """Hands it back for another worker at once."""
        ...

    async def term(self, reason: str) -> None:
        """Removes it to the dead letters, without its init image: it can never work."""
        ...

    async def in_progress(self) -> None:
        """Resets the redelivery clock. To be called every third of ack_wait."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLoad:
    """What lies in one lane of one model.

    `waiting`: jobs never taken. `taken`: jobs that were taken and have not ended, those handed back
    included. `last_taken`: the highest place ever taken; 0: none.
    """

    waiting: int
    taken: int
    last_taken: int


class JobQueue(Protocol):
    """Durable work queue by model, lane and tenant; each of these parts is bounded."""

    @property
    def ack_wait_seconds(self) -> float: ...

    async def put(self, job: QueuedJob, model: str, lane: Lane) -> int:
        """Queues the job for workers of the model and returns its place: a growing number above 0.

        A job id is queued once: putting it again within 20 s returns the place it got.

        Raises:
            QueueFullError: the tenant has its limit of unfinished jobs in this model and lane.
            UnavailableError: the bus is down.
        """
        ...

    async def remove(self, sequence: int) -> bool:
        """Withdraws a job that nobody has finished; False when it is gone already."""
        ...

    async def position(self, model: str, lane: Lane, sequence: int) -> int:
        """Jobs of that lane not yet taken that lie before `sequence`; -1 when unknown.

        An upper bound where several lanes and models share the queue.
        """
        ...

    async def depth(self, model: str, lane: Lane) -> int:
        """Jobs of that lane that no worker has taken."""
        ...

    async def load(self, model: str, lane: Lane) -> LaneLoad:
        """The numbers of that lane, at the cost of one question to the bus however many jobs."""
        ...

    async def unfinished(self, tenant: str) -> int:
        """The tenant's jobs of all models and lanes, those being run included.

        To refuse before work is done for a job: others may be put meanwhile.
        """
        ...

    async def pull(
        self, model: str, lanes: Sequence[Lane], most: int, timeout_seconds: float
    ) -> list[Delivery]:
        """Takes up to `most` jobs, earlier lanes first; empty when none came in time."""
        ...


class EventWriter(Protocol):
    """Appends to one job's log, in order. One at a time owns a log; a second one takes it over."""

    @property
    def sequence(self) -> int:
        """Number of the last event, 0 for an empty log."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the log already has its terminal event."""
        ...

    async def append(self, event: Event) -> Envelope:
        """Numbers and stores the event.

        Raises:
            OwnershipLostError: another writer has taken over.
        """
        ...


class EventLog(Protocol):
    """Numbered, replayable events of every job."""

    async def open(self, job_id: int, *, fresh: bool = False) -> EventWriter:
        """Takes over the log of a job; `fresh` says that it is known to be empty."""
        ...

    async def last_sequence(self, job_id: int) -> int:
        """Returns the number of the last event, 0 for an empty log. Its writer keeps the log."""
        ...

    def watch(
        self, job_id: int, after_sequence: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Envelope]]:
        """Replays events above `after_sequence`, then follows live; never ends by itself.

        Once the context is entered no event that is written later is missed.
        """
        ...


class WorkerCommand(StrEnum):
    """What every worker can be told to do.

    `RESTART`: hand running jobs back, end and come again as a new process. `CLEAR_CACHE`: forget
    what is kept for speed only.
    """

    RESTART = "restart"
    CLEAR_CACHE = "clear_cache"


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
    """One api's message to all apis, itself included. `grace_seconds`: what is left, if BROKEN."""

    state: StreamState
    tenant: str
    job_id: int
    grace_seconds: float = 0.0


class Control(Protocol):
    """Commands that reach every worker, and notices that reach every api, at once; not stored."""

    async def cancel(self, job_id: int) -> None:
        """Asks the worker that runs the job to stop it at its next step."""
        ...

    def on_cancel(
        self, handler: Callable[[int], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with the id of every job that shall be cancelled."""
        ...

    async def broadcast(self, broadcast: WorkerCommand) -> None:
        """Tells every worker that listens now."""
        ...

    def on_command(
        self, handler: Callable[[WorkerCommand], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with every order."""
        ...

    async def notify(self, notice: StreamNotice) -> None:
        """Tells every api that listens now."""
        ...

    def on_notice(
        self, handler: Callable[[StreamNotice], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Calls `handler` with every notice."""
        ...
