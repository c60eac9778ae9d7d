"""Work queue and permits in memory, by the rules of JetStream."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from img2img_server import clock
from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError
from img2img_server.interfaces.queue import (
    Delivery,
    InTurn,
    LaneLoad,
    QueuedJob,
    QueueSource,
    SourceLoad,
    SourceOrder,
    slot_of,
)
from img2img_server.testing.notifier import Notifier, listed

POLL_SECONDS = 1.0  # longest time between two looks at the queue while nothing changes


@dataclass(slots=True, eq=False)
class _Message:
    sequence: int
    job: QueuedJob
    place: tuple[str, Lane]
    size: int = 0
    deliveries: int = 0
    time: float = field(default_factory=clock.now)  # when it was queued
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

    async def next_before(self, before: float, after: int = 0) -> tuple[int, QueuedJob] | None:
        for message in self._messages.values():
            if message.sequence > after and message.time < before:
                return message.sequence, message.job.without_image()
        return None

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
        with listed(self._holders.setdefault(model, []), handler):
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
