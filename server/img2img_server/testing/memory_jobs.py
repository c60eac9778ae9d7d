"""Work queue inside one process: for tests, the same rules as JetStream."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError
from img2img_server.interfaces.queue import Delivery, LaneLoad, QueuedJob
from img2img_server.testing.notifier import Notifier


@dataclass(slots=True, eq=False)
class _Message:
    sequence: int
    job: QueuedJob
    place: tuple[str, Lane]
    deliveries: int = 0
    redelivery: asyncio.TimerHandle | None = None  # set while a worker has the message

    @property
    def taken(self) -> bool:
        return self.redelivery is not None

    def is_for(self, model: str, lane: Lane) -> bool:
        return self.place == (model, lane)

    def release(self) -> None:
        if self.redelivery is not None:
            self.redelivery.cancel()
            self.redelivery = None


class MemoryJobQueue:
    """A JobQueue of one process. `dead`: what was given to term, with its reason."""

    def __init__(self, *, limit: int = 15, ack_wait_seconds: float = 15.0) -> None:
        self._limit = limit
        self._ack_wait_seconds = ack_wait_seconds
        self._messages: dict[int, _Message] = {}
        self._known: dict[int, int] = {}  # sequence by job id: a job put twice is queued once
        self._sequences = itertools.count(1)
        self._delivered: dict[tuple[str, Lane], int] = {}
        self._bell = Notifier()
        self.dead: list[tuple[QueuedJob, str]] = []

    @property
    def ack_wait_seconds(self) -> float:
        return self._ack_wait_seconds

    async def put(self, job: QueuedJob, model: str, lane: Lane) -> int:
        if job.job_id in self._known:
            return self._known[job.job_id]
        mine = [m for m in self._messages.values() if m.job.tenant == job.tenant]
        if sum(m.is_for(model, lane) for m in mine) >= self._limit:
            raise QueueFullError(self._limit)
        sequence = self._known[job.job_id] = next(self._sequences)
        self._messages[sequence] = _Message(sequence, job, (model, lane))
        self._bell.notify()
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
        self, model: str, lanes: Sequence[Lane], most: int, timeout_seconds: float
    ) -> list[Delivery]:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while True:
                    changed = self._bell.wait_handle()
                    waiting = [m for lane in lanes for m in self._waiting(model, lane)]
                    if waiting:
                        return [self._deliver(message) for message in waiting[:most]]
                    await changed.wait()
        return []

    def _waiting(self, model: str, lane: Lane) -> list[_Message]:
        return [m for m in self._messages.values() if not m.taken and m.is_for(model, lane)]

    def _deliver(self, message: _Message) -> Delivery:
        message.deliveries += 1
        delivered = self._delivered.get(message.place, 0)
        self._delivered[message.place] = max(delivered, message.sequence)
        self.restart_clock(message)
        return _MemoryDelivery(self, message, message.deliveries)

    def restart_clock(self, message: _Message) -> None:
        """Gives the message back when ack_wait passes from now on."""
        message.release()
        loop = asyncio.get_running_loop()
        message.redelivery = loop.call_later(self._ack_wait_seconds, self.give_back, message)

    def give_back(self, message: _Message) -> None:
        """Makes a taken message available again."""
        message.release()
        self._bell.notify()

    def finish(self, message: _Message, reason: str | None = None) -> None:
        """Removes the message; with a reason it goes to the dead letters."""
        if self._pop(message.sequence) is not None and reason is not None:
            self.dead.append((message.job.without_image(), reason))

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
        self._queue.finish(self._message)

    async def nak(self) -> None:
        if self._current:
            self._queue.give_back(self._message)

    async def term(self, reason: str) -> None:
        self._queue.finish(self._message, reason)

    async def in_progress(self) -> None:
        if self._current:
            self._queue.restart_clock(self._message)
