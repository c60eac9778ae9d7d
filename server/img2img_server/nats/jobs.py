"""The work queue on the JOBS stream.

A subject names the model, lane, size class, slot and tenant of its jobs. One durable pull consumer
serves each slot, created with its first job. Which jobs exist is read from the stream's subjects,
by one request, so a worker can choose the consumer from which it pulls. Two notices that are not
stored shorten the waits: `queued` after a job was put or requeued, `wanted` from an idle worker.
A lost notice costs at most POLL_SECONDS. See docs/adr/0014-where-jobs-wait.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC
from functools import partial
from typing import Final

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo

from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError, UnavailableError
from img2img_server.interfaces.queue import (
    Delivery,
    InTurn,
    LaneLoad,
    QueuedJob,
    QueueSource,
    SourceLoad,
    SourceOrder,
)
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import SubjectFullError, unavailable
from img2img_server.nats.permits import JetStreamPermits
from img2img_server.nats.pull import Puller

MAX_ACK_PENDING: Final = 10_000  # most delivered and unacknowledged jobs of one consumer
# seconds; greatest age of the consumer state from which position and depth are computed
INFO_SECONDS: Final = 0.2
POLL_SECONDS: Final = 1.0  # longest time between two looks at the queue while no notice arrives
# Busy workers look this much later than idle ones after a notice, so that idle ones get the job.
BUSY_DELAY_SECONDS: Final = 0.01
RETRY_SECONDS: Final = 0.03  # after a notice that was faster than the requeued job
# A busy worker that cannot use the job passes the notice on, at most this often.
MOST_HOPS: Final = 4
# The list of tenants with unfinished jobs is used again for this time for each of them: with 10,000
# tenants a worker reads 600 kB a second.
LIST_SECONDS: Final = 1e-4
# A consumer without pulls is deleted after this time, which is longer than the life of a job.
UNUSED_SECONDS: Final = 7 * 24 * 3600.0
_EARLIER_SLOT: Final = -1  # stands for the jobs of a lane that version 0.1.0 queued

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JetStreamDelivery:
    """A Delivery on JetStream. Every method raises UnavailableError when NATS is down."""

    _link: NatsConnection
    _msg: Msg
    job: QueuedJob
    _requeued: Callable[[], Awaitable[None]]  # wakes an idle worker

    @property
    def attempt(self) -> int:
        return int(self._msg.metadata.num_delivered)

    async def ack(self) -> None:
        # The ack is sent as a request: after a lost ack another worker would run the job again.
        await self._link.request(self._msg.reply, Msg.Ack.Ack)
        await self._release()

    async def nak(self) -> None:
        await self._link.send(self._msg.reply, Msg.Ack.Nak)
        await self._requeued()

    async def term(self, reason: str) -> None:
        await dead_letter(self._link, self._msg, codec.encode(self.job.without_image()), reason)
        await self._release()

    async def _release(self) -> None:
        """Releases the job's permit. A permit that stays is found when its tenant's limit is
        reached.
        """
        with suppress(UnavailableError):
            await JetStreamPermits(self._link).release(self.job.permit)

    async def in_progress(self) -> None:
        await self._link.send(self._msg.reply, Msg.Ack.Progress)


async def dead_letter(link: NatsConnection, msg: Msg, content: bytes, reason: str) -> None:
    """Stores the content as a dead letter, then removes the message from the queue."""
    headers = {
        "Nats-Msg-Id": f"dead-{msg.metadata.sequence.stream}",
        "Img2img-Reason": " ".join(reason.split()),
        "Img2img-Attempts": str(msg.metadata.num_delivered),
    }
    await link.publish(subjects.dead_subject(msg.subject), content, headers)
    await link.request(msg.reply, Msg.Ack.Term)


class _Notices:
    """Notices that jobs wait, as they arrive during one pull."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.hops = 0

    async def receive(self, msg: Msg) -> None:
        self.hops = int(msg.data) if msg.data.isdigit() else 0
        self.arrived.set()

    async def wait(self, interrupt: asyncio.Event | None, seconds: float) -> bool:
        """Waits for a notice. Returns whether one arrived before the interrupt or the end."""
        waits = [asyncio.ensure_future(self.arrived.wait())]
        if interrupt:
            waits.append(asyncio.ensure_future(interrupt.wait()))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self.arrived.is_set()


class JetStreamJobQueue:
    """A JobQueue on JetStream."""

    def __init__(self, link: NatsConnection, *, limit: int, ack_wait_seconds: float) -> None:
        self._link = link
        self._limit = limit
        self.ack_wait_seconds = ack_wait_seconds
        self._puller = Puller(link, subjects.JOBS)
        self._infos: dict[str, tuple[float, ConsumerInfo]] = {}
        self._lists: dict[str, tuple[float, list[QueueSource]]] = {}

    async def put(self, job: QueuedJob, model: str, lane: Lane, size: int = 0) -> int:
        subject = subjects.jobs_subject(model, lane, size, job.tenant)
        # With the id, the server ignores a repeated publish after a lost response.
        headers = {"Nats-Msg-Id": f"{job.job_id}-{job.permit}"}
        try:
            place = (await self._link.publish(subject, codec.encode(job), headers)).seq
        except SubjectFullError as error:
            raise QueueFullError(self._limit) from error
        await self._notify(model)
        return place

    async def remove(self, sequence: int) -> bool:
        return await self._link.delete(subjects.JOBS, sequence)

    async def position(self, model: str, lane: Lane, sequence: int) -> int:
        load = await self.load(model, lane)
        # All lanes share the sequence, so the difference of two numbers is an upper bound.
        return max(0, min(sequence - load.last_taken - 1, load.waiting - 1))

    async def depth(self, model: str, lane: Lane) -> int:
        return (await self.load(model, lane)).waiting

    async def load(self, model: str, lane: Lane) -> LaneLoad:
        loads = [load for load in await self.loads(model) if load.source.lane == lane]
        return LaneLoad(
            waiting=sum(load.waiting for load in loads),
            taken=sum(load.taken for load in loads),
            last_taken=max((load.last_taken for load in loads), default=0),
        )

    async def next_before(self, before: float, after: int = 0) -> tuple[int, QueuedJob] | None:
        while True:
            start = after + 1
            msg = await self._link.next(subjects.JOBS, subjects.ALL_JOBS, start)
            if (
                msg is None
                or msg.time is None
                or msg.time.replace(tzinfo=UTC).timestamp() >= before
            ):
                return None
            after = msg.seq or start
            with suppress(codec.UndecodableError):  # Its worker makes it a dead letter.
                return after, codec.decode(msg.data or b"", QueuedJob).without_image()

    async def loads(self, model: str) -> list[SourceLoad]:
        sources = await self._sources(model)
        infos = await asyncio.gather(*(self._info(model, source) for source in sources))
        return [_load(source, info) for source, info in zip(sources, infos, strict=True)]

    async def unfinished(self, tenant: str) -> int:
        return await self._link.count(subjects.JOBS, subjects.tenant_filter(tenant))

    async def _sources(self, model: str) -> list[QueueSource]:
        """Returns the sources of a model with unfinished jobs. The more tenants they have, the less
        often they are read.
        """
        now = time.monotonic()
        until, sources = self._lists.get(model, (0.0, []))
        if now < until:
            return sources
        subject = subjects.model_filter(model)
        found = await self._link.ask(lambda: self._link.js.stream_info(subjects.JOBS, subject))
        jobs: dict[tuple[Lane, int, int], dict[str, int]] = {}
        for name, number in (found.state.subjects or {}).items():
            lane, *place, tenant = name.split(".")[3:]
            size, slot = map(int, place) if place else (0, _EARLIER_SLOT)
            jobs.setdefault((Lane(lane), size, slot), {})[subjects.text_of(tenant)] = number
        sources = [
            QueueSource(lane=lane, size=size, slot=slot, jobs=each)
            for (lane, size, slot), each in sorted(jobs.items())
        ]
        self._lists[model] = now + LIST_SECONDS * len(found.state.subjects or ()), sources
        return sources

    async def _info(self, model: str, source: QueueSource) -> ConsumerInfo | None:
        """Returns a consumer's state, at most INFO_SECONDS old; None without a consumer."""
        name = self._consumer(model, source).durable_name or ""
        now = asyncio.get_running_loop().time()
        read_at, known = self._infos.get(name, (0.0, None))
        if known is not None and now - read_at < INFO_SECONDS:
            return known
        try:
            info: ConsumerInfo = await self._link.ask(
                lambda: self._link.js.consumer_info(subjects.JOBS, name)
            )
        except nats.js.errors.NotFoundError:
            return None
        self._infos[name] = (now, info)
        return info

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
        """Takes up to `most` jobs of the first source that has some. Raises UnavailableError."""
        order = order or InTurn(lanes)
        ends = time.monotonic() + timeout_seconds
        async with self._notices(model, is_idle) as notices:
            noticed = False
            while True:
                notices.arrived.clear()
                listed = [each for each in await self._sources(model) if each.lane in lanes]
                sources = order.order(listed)
                taken, source = await self._take(model, sources, most)
                order.note(sources[: sources.index(source)] if source else sources, source)
                if taken:
                    if sum(sum(each.jobs.values()) for each in listed) > len(taken):
                        await self._notify(model)  # Another worker may take the next job.
                    return taken
                if is_idle:
                    await self._link.send(subjects.wanted_subject(model), b"")
                elif noticed and notices.hops < MOST_HOPS:
                    await self._notify(model, notices.hops + 1)
                left = ends - time.monotonic()
                if left <= 0 or (interrupt and interrupt.is_set()):
                    return []
                pause = RETRY_SECONDS if noticed and sources else POLL_SECONDS
                noticed = await notices.wait(interrupt, min(left, pause))
                if noticed and not is_idle:
                    await asyncio.sleep(BUSY_DELAY_SECONDS)

    async def _take(
        self, model: str, sources: Sequence[QueueSource], most: int
    ) -> tuple[list[Delivery], QueueSource | None]:
        """Pulls from each source in turn. Returns the jobs and their source."""
        if not sources:
            return [], None
        consumers = [self._consumer(model, source) for source in sources]
        msgs = await self._puller.pull(consumers, most, 0.0)
        if not msgs:
            return [], None
        names = [consumer.durable_name for consumer in consumers]
        source = sources[names.index(msgs[0].metadata.consumer)]
        return await self._deliveries(model, msgs), source

    @asynccontextmanager
    async def _notices(self, model: str, is_idle: bool) -> AsyncIterator[_Notices]:
        """Receives notices. The server gives each to one idle and one busy worker."""
        notices = _Notices()
        group = "idle" if is_idle else "busy"
        async with self._subscribed(subjects.queued_subject(model), group, notices.receive):
            yield notices

    async def _notify(self, model: str, hops: int = 0) -> None:
        """Wakes one idle and one busy worker for a waiting job. Without NATS, they look later."""
        with suppress(UnavailableError):
            await self._link.send(subjects.queued_subject(model), str(hops).encode())

    def on_wanted(
        self, model: str, handler: Callable[[], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        async def receive(_: Msg) -> None:
            await handler()

        return self._subscribed(subjects.wanted_subject(model), "holders", receive)

    @asynccontextmanager
    async def _subscribed(
        self, subject: str, group: str, receive: Callable[[Msg], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Receives messages of a subject; each goes to one member of the group."""
        await self._link.ready()
        with unavailable():
            subscription = await self._link.nc.subscribe(subject, queue=group, cb=receive)
        try:
            yield
        finally:
            with suppress(nats.errors.Error, asyncio.TimeoutError):
                await subscription.unsubscribe()

    async def _deliveries(self, model: str, taken: list[Msg]) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for msg in taken:
            try:
                job = codec.decode(msg.data, QueuedJob)
            except codec.UndecodableError as error:
                log.warning("undecodable_job_dead_lettered: %s", error)
                # The content may hold an image, so the dead letter has none.
                await dead_letter(self._link, msg, b"", str(error))
            else:
                requeued = partial(self._notify, model)
                deliveries.append(JetStreamDelivery(self._link, msg, job, requeued))
        return deliveries

    def _consumer(self, model: str, source: QueueSource) -> ConsumerConfig:
        if source.slot == _EARLIER_SLOT:
            name = subjects.earlier_lane_consumer(model, source.lane)
            subject = subjects.earlier_lane_filter(model, source.lane)
            unused_seconds = None  # as version 0.1.0 creates it
        else:
            name = subjects.source_consumer(model, *source.key)
            subject = subjects.source_filter(model, *source.key)
            unused_seconds = UNUSED_SECONDS
        return ConsumerConfig(
            durable_name=name,
            filter_subject=subject,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self.ack_wait_seconds,
            max_deliver=-1,  # The worker limits the attempts, not the consumer.
            max_ack_pending=MAX_ACK_PENDING,
            inactive_threshold=unused_seconds,
        )


def _load(source: QueueSource, info: ConsumerInfo | None) -> SourceLoad:
    if info is None:  # no worker has ever pulled: all jobs wait
        waiting = sum(source.jobs.values())
        return SourceLoad(source=source, waiting=waiting, taken=0, last_taken=0)
    return SourceLoad(
        source=source,
        waiting=info.num_pending or 0,
        taken=info.num_ack_pending or 0,
        last_taken=(info.delivered.stream_seq or 0) if info.delivered else 0,
    )
