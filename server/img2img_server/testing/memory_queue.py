"""Work queue, event log and control channel in memory, by the rules of JetStream."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from img2img_server.domain.events import TERMINAL, Envelope, Event, Preview
from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError
from img2img_server.interfaces.queue import (
    Delivery,
    InTurn,
    LaneLoad,
    ModelCommand,
    OwnershipLostError,
    QueuedJob,
    QueueSource,
    SourceLoad,
    SourceOrder,
    StreamNotice,
    UsageReport,
    WorkerCommand,
    slot_of,
)
from img2img_server.nats.events import Envelopes

T = TypeVar("T")

POLL_SECONDS = 1.0  # longest time between two looks at the queue while nothing changes


class Notifier:
    """Wakes all waiting tasks after a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def wait_handle(self) -> asyncio.Event:
        """Returns the event that the next change sets. Take it before reading the state that may
        change.
        """
        return self._event


@dataclass(slots=True, eq=False)
class _Message:
    sequence: int
    job: QueuedJob
    place: tuple[str, Lane]
    size: int = 0
    deliveries: int = 0
    redelivery: asyncio.TimerHandle | None = None  # set while a worker holds the message

    @property
    def taken(self) -> bool:
        return self.redelivery is not None

    @property
    def source(self) -> tuple[Lane, int, int]:
        return self.place[1], self.size, slot_of(self.job.tenant)

    def is_for(self, model: str, lane: Lane) -> bool:
        return self.place == (model, lane)

    def release(self) -> None:
        if self.redelivery is not None:
            self.redelivery.cancel()
            self.redelivery = None


class MemoryPermits:
    """Permits in memory."""

    def __init__(self, *, limit: int = 15) -> None:
        self._limit = limit
        self._numbers = itertools.count(1)
        self._taken: dict[int, tuple[str, int]] = {}

    async def take(self, tenant: str, job_id: int) -> int:
        if await self.count(tenant) >= self._limit:
            raise QueueFullError(self._limit)
        permit = next(self._numbers)
        self._taken[permit] = tenant, job_id
        return permit

    async def release(self, permit: int) -> None:
        self._taken.pop(permit, None)

    async def count(self, tenant: str) -> int:
        return sum(owner == tenant for owner, _ in self._taken.values())

    async def oldest(self, tenant: str, most: int) -> list[tuple[int, int]]:
        taken = self._taken.items()
        return [(permit, job_id) for permit, (owner, job_id) in taken if owner == tenant][:most]


class MemoryJobQueue:
    """A JobQueue in memory. `dead`: the messages that were dead-lettered, each with its reason."""

    def __init__(
        self,
        *,
        limit: int = 15,
        ack_wait_seconds: float = 15.0,
        permits: MemoryPermits | None = None,
    ) -> None:
        self._limit = limit
        self._permits = permits or MemoryPermits(limit=limit)
        self._ack_wait_seconds = ack_wait_seconds
        self._messages: dict[int, _Message] = {}
        # sequence by job id and permit, so that a job is queued only once
        self._known: dict[tuple[int, int], int] = {}
        self._sequences = itertools.count(1)
        self._delivered: dict[tuple[str, Lane], int] = {}
        self._changes = Notifier()
        self._holders: dict[str, list[Callable[[], Awaitable[None]]]] = {}
        self.dead: list[tuple[QueuedJob, str]] = []

    @property
    def ack_wait_seconds(self) -> float:
        return self._ack_wait_seconds

    async def put(self, job: QueuedJob, model: str, lane: Lane, size: int = 0) -> int:
        key = job.job_id, job.permit
        if key in self._known:
            return self._known[key]
        mine = [m for m in self._messages.values() if m.job.tenant == job.tenant]
        if sum(m.is_for(model, lane) and m.size == size for m in mine) >= self._limit:
            raise QueueFullError(self._limit)
        sequence = self._known[key] = next(self._sequences)
        self._messages[sequence] = _Message(sequence, job, (model, lane), size)
        self._changes.notify()
        return sequence

    async def remove(self, sequence: int) -> bool:
        return self._pop(sequence) is not None

    async def position(self, model: str, lane: Lane, sequence: int) -> int:
        taken = self._delivered.get((model, lane), 0)
        return sum(taken < message.sequence < sequence for message in self._waiting(model, lane))

    async def depth(self, model: str, lane: Lane) -> int:
        return len(self._waiting(model, lane))

    async def load(self, model: str, lane: Lane) -> LaneLoad:
        mine = [m for m in self._messages.values() if m.is_for(model, lane)]
        return LaneLoad(
            waiting=sum(not m.deliveries for m in mine),
            taken=sum(m.deliveries > 0 for m in mine),
            last_taken=self._delivered.get((model, lane), 0),
        )

    async def unfinished(self, tenant: str) -> int:
        return sum(message.job.tenant == tenant for message in self._messages.values())

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
        order = order or InTurn(lanes)
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout_seconds
        while True:
            changed = self._changes.wait_handle()
            if taken := self._take(model, lanes, most, order):
                return taken
            if is_idle and self._holders.get(model):
                await self._holders[model][0]()
            left = ends - loop.time()
            if left <= 0 or (interrupt and interrupt.is_set()):
                return []
            waits = [asyncio.ensure_future(changed.wait())]
            if interrupt:
                waits.append(asyncio.ensure_future(interrupt.wait()))
            await asyncio.wait(
                waits, timeout=min(left, POLL_SECONDS), return_when=asyncio.FIRST_COMPLETED
            )
            for wait in waits:
                wait.cancel()
            if not is_idle:
                await asyncio.sleep(0)  # Idle workers get the job.

    async def loads(self, model: str) -> list[SourceLoad]:
        found = []
        for source in self._sources(model, list(Lane)):
            mine = [
                m for m in self._messages.values() if m.place[0] == model and m.source == source.key
            ]
            delivered = [m for m in mine if m.deliveries]
            found.append(
                SourceLoad(
                    source=source,
                    waiting=len(mine) - len(delivered),
                    taken=len(delivered),
                    last_taken=max((m.sequence for m in delivered), default=0),
                )
            )
        return found

    def _sources(self, model: str, lanes: Sequence[Lane]) -> list[QueueSource]:
        jobs: dict[tuple[Lane, int, int], Counter[str]] = {}
        for message in self._messages.values():
            if message.place[0] == model and message.place[1] in lanes:
                jobs.setdefault(message.source, Counter())[message.job.tenant] += 1
        return [
            QueueSource(lane=lane, size=size, slot=slot, jobs=each)
            for (lane, size, slot), each in jobs.items()
        ]

    def _take(
        self, model: str, lanes: Sequence[Lane], most: int, order: SourceOrder
    ) -> list[Delivery]:
        listed = self._sources(model, lanes)
        empty: list[QueueSource] = []
        for source in order.order(listed):
            waiting = [m for m in self._waiting(model, source.lane) if m.source == source.key]
            if waiting:
                order.note(empty, source)
                return [self._deliver(message) for message in waiting[:most]]
            empty.append(source)
        order.note(empty, None)
        return []

    @asynccontextmanager
    async def on_wanted(
        self, model: str, handler: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with _listed(self._holders.setdefault(model, []), handler):
            yield

    def _waiting(self, model: str, lane: Lane) -> list[_Message]:
        return [m for m in self._messages.values() if not m.taken and m.is_for(model, lane)]

    def _deliver(self, message: _Message) -> Delivery:
        message.deliveries += 1
        delivered = self._delivered.get(message.place, 0)
        self._delivered[message.place] = max(delivered, message.sequence)
        self.restart_clock(message)
        return _MemoryDelivery(self, message, message.deliveries)

    def restart_clock(self, message: _Message) -> None:
        """Restarts the ack_wait of the message."""
        message.release()
        loop = asyncio.get_running_loop()
        message.redelivery = loop.call_later(self._ack_wait_seconds, self.give_back, message)

    def give_back(self, message: _Message) -> None:
        """Requeues a taken message."""
        message.release()
        self._changes.notify()

    async def finish(self, message: _Message, reason: str | None = None) -> None:
        """Removes the message and its permit. With a reason, it becomes a dead letter."""
        if self._pop(message.sequence) is not None and reason is not None:
            self.dead.append((message.job.without_image(), reason))
        await self._permits.release(message.job.permit)

    def _pop(self, sequence: int) -> _Message | None:
        message = self._messages.pop(sequence, None)
        if message is not None:
            message.release()
        return message


class _MemoryDelivery:
    def __init__(self, queue: MemoryJobQueue, message: _Message, attempt: int) -> None:
        self._queue = queue
        self._message = message
        self._attempt = attempt

    @property
    def job(self) -> QueuedJob:
        return self._message.job

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def _current(self) -> bool:
        return self._message.taken and self._message.deliveries == self._attempt

    async def ack(self) -> None:
        await self._queue.finish(self._message)

    async def nak(self) -> None:
        if self._current:
            self._queue.give_back(self._message)

    async def term(self, reason: str) -> None:
        await self._queue.finish(self._message, reason)

    async def in_progress(self) -> None:
        if self._current:
            self._queue.restart_clock(self._message)


@dataclass(slots=True, eq=False)
class _Log:
    entries: list[Envelope] = field(default_factory=list)
    # The number of events without previews. A writer with an older number has lost the log.
    revision: int = 0
    changes: Notifier = field(default_factory=Notifier)

    async def read(self, last_sequence: int) -> Envelope:
        """Waits for the first entry after the last sequence."""
        while True:
            changed = self.changes.wait_handle()
            for entry in self.entries:
                if entry.sequence > last_sequence:
                    return entry
            await changed.wait()


class MemoryEventLog:
    """An EventLog in memory. It keeps all events except replaced previews."""

    def __init__(self) -> None:
        self._logs: dict[int, _Log] = {}

    def _log(self, job_id: int) -> _Log:
        return self._logs.setdefault(job_id, _Log())

    async def open(
        self, job_id: int, *, tenant: str = "", fresh: bool = False
    ) -> _MemoryEventWriter:
        return _MemoryEventWriter(job_id, self._log(job_id), fresh)

    async def remove_expired(self) -> None: ...

    async def last_sequence(self, job_id: int) -> int:
        entries = self._log(job_id).entries
        return entries[-1].sequence if entries else 0

    @asynccontextmanager
    async def watch(
        self, job_id: int, after_sequence: int = 0, *, tenant: str = ""
    ) -> AsyncIterator[AsyncIterator[Envelope]]:
        yield Envelopes(self._log(job_id).read, after_sequence)


class _MemoryEventWriter:
    def __init__(self, job_id: int, log: _Log, fresh: bool) -> None:
        self._job_id = job_id
        self._log = log
        self._revision = 0 if fresh else log.revision
        known = [] if fresh else log.entries
        self._sequence = known[-1].sequence if known else 0
        logged = [entry for entry in known if not isinstance(entry.event, Preview)]
        self._previous = logged[-1].sequence if logged else 0
        self._ended = any(entry.is_terminal for entry in known)

    @property
    def sequence(self) -> int:
        return self._sequence

    @property
    def ended(self) -> bool:
        return self._ended

    def continue_after(self, number: int) -> None:
        if number > self._sequence:
            self._sequence = self._previous = number

    async def append(self, event: Event) -> Envelope:
        log = self._log
        if log.revision != self._revision:
            raise OwnershipLostError(f"job {self._job_id}: another writer has the log")
        self._sequence += 1
        entry = Envelope(
            sequence=self._sequence,
            time=time.time(),
            job_id=self._job_id,
            event=event,
            previous=self._previous,
        )
        if isinstance(event, Preview):
            log.entries = [e for e in log.entries if not _same_preview(e.event, event)]
        else:
            log.revision += 1
            self._revision += 1
            self._previous = entry.sequence
        log.entries.append(entry)
        self._ended = self._ended or isinstance(event, TERMINAL)
        log.changes.notify()
        return entry


def _same_preview(old: Event, new: Preview) -> bool:
    return isinstance(old, Preview) and old.sample == new.sample


class MemoryControl:
    """A Control in memory."""

    def __init__(self) -> None:
        self._cancel_handlers: list[Callable[[int], Awaitable[None]]] = []
        self._command_handlers: list[Callable[[WorkerCommand], Awaitable[None]]] = []
        self._model_handlers: list[Callable[[ModelCommand], Awaitable[None]]] = []
        self._notice_handlers: list[Callable[[StreamNotice], Awaitable[None]]] = []
        self._usage_handlers: list[Callable[[UsageReport], Awaitable[None]]] = []

    async def cancel(self, job_id: int) -> None:
        for handler in list(self._cancel_handlers):
            await handler(job_id)

    async def broadcast(self, command: WorkerCommand) -> None:
        for handler in list(self._command_handlers):
            await handler(command)

    @asynccontextmanager
    async def on_cancel(self, handler: Callable[[int], Awaitable[None]]) -> AsyncIterator[None]:
        with _listed(self._cancel_handlers, handler):
            yield

    @asynccontextmanager
    async def on_command(
        self, handler: Callable[[WorkerCommand], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with _listed(self._command_handlers, handler):
            yield

    async def command_model(self, command: ModelCommand) -> None:
        for handler in list(self._model_handlers):
            await handler(command)

    @asynccontextmanager
    async def on_model_command(
        self, handler: Callable[[ModelCommand], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with _listed(self._model_handlers, handler):
            yield

    async def notify(self, notice: StreamNotice) -> None:
        for handler in list(self._notice_handlers):
            await handler(notice)

    @asynccontextmanager
    async def on_notice(
        self, handler: Callable[[StreamNotice], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with _listed(self._notice_handlers, handler):
            yield

    async def report_usage(self, report: UsageReport) -> None:
        for handler in list(self._usage_handlers):
            await handler(report)

    @asynccontextmanager
    async def on_usage(
        self, handler: Callable[[UsageReport], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with _listed(self._usage_handlers, handler):
            yield


@contextmanager
def _listed(handlers: list[T], handler: T) -> Iterator[None]:
    handlers.append(handler)
    try:
        yield
    finally:
        handlers.remove(handler)
