"""The work queue on the JOBS stream: one durable pull consumer for each model and lane."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo

from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError, UnavailableError
from img2img_server.interfaces.queue import Delivery, LaneLoad, QueuedJob
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import SubjectFullError
from img2img_server.nats.permits import JetStreamPermits
from img2img_server.nats.pull import Puller

MAX_ACK_PENDING: Final = 10_000  # most delivered and unacknowledged jobs of one model and lane
# seconds; greatest age of the consumer state from which position and depth are computed
INFO_SECONDS: Final = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JetStreamDelivery:
    """A Delivery on JetStream. Every method raises UnavailableError when NATS is down."""

    _link: NatsConnection
    _msg: Msg
    job: QueuedJob

    @property
    def attempt(self) -> int:
        return int(self._msg.metadata.num_delivered)

    async def ack(self) -> None:
        # The ack is sent as a request: after a lost ack another worker would run the job again.
        await self._link.request(self._msg.reply, Msg.Ack.Ack)
        await self._release()

    async def nak(self) -> None:
        await self._link.send(self._msg.reply, Msg.Ack.Nak)

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


class JetStreamJobQueue:
    """A JobQueue on JetStream."""

    def __init__(self, link: NatsConnection, *, limit: int, ack_wait_seconds: float) -> None:
        self._link = link
        self._limit = limit
        self.ack_wait_seconds = ack_wait_seconds
        self._puller = Puller(link, subjects.JOBS)
        self._infos: dict[str, tuple[float, ConsumerInfo]] = {}

    async def put(self, job: QueuedJob, model: str, lane: Lane) -> int:
        subject = subjects.jobs_subject(model, lane, job.tenant)
        # With the id, the server ignores a repeated publish after a lost response.
        headers = {"Nats-Msg-Id": f"{job.job_id}-{job.permit}"}
        try:
            return (await self._link.publish(subject, codec.encode(job), headers)).seq
        except SubjectFullError as error:
            raise QueueFullError(self._limit) from error

    async def remove(self, sequence: int) -> bool:
        return await self._link.delete(subjects.JOBS, sequence)

    async def position(self, model: str, lane: Lane, sequence: int) -> int:
        load = await self.load(model, lane)
        # All lanes share the sequence, so the difference of two numbers is an upper bound.
        return max(0, min(sequence - load.last_taken - 1, load.waiting - 1))

    async def depth(self, model: str, lane: Lane) -> int:
        return (await self.load(model, lane)).waiting

    async def load(self, model: str, lane: Lane) -> LaneLoad:
        info = await self._info(model, lane)
        if info is None:  # no worker has ever pulled: all jobs wait
            waiting = await self._link.count(subjects.JOBS, subjects.lane_filter(model, lane))
            return LaneLoad(waiting=waiting, taken=0, last_taken=0)
        return LaneLoad(
            waiting=info.num_pending or 0,
            taken=info.num_ack_pending or 0,
            last_taken=(info.delivered.stream_seq or 0) if info.delivered else 0,
        )

    async def unfinished(self, tenant: str) -> int:
        return await self._link.count(subjects.JOBS, subjects.tenant_filter(tenant))

    async def _info(self, model: str, lane: Lane) -> ConsumerInfo | None:
        """Returns the consumer's state, at most INFO_SECONDS old; None without a consumer."""
        name = subjects.lane_consumer(model, lane)
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
        self, model: str, lanes: Sequence[Lane], most: int, timeout_seconds: float
    ) -> list[Delivery]:
        """Takes up to `most` jobs, earlier lanes first. Raises UnavailableError."""
        consumers = [self._consumer(model, lane) for lane in lanes]
        return await self._deliveries(await self._puller.pull(consumers, most, timeout_seconds))

    async def _deliveries(self, taken: list[Msg]) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for msg in taken:
            try:
                job = codec.decode(msg.data, QueuedJob)
            except codec.UndecodableError as error:
                log.warning("undecodable_job_dead_lettered: %s", error)
                # The content may hold an image, so the dead letter has none.
                await dead_letter(self._link, msg, b"", str(error))
            else:
                deliveries.append(JetStreamDelivery(self._link, msg, job))
        return deliveries

    def _consumer(self, model: str, lane: Lane) -> ConsumerConfig:
        return ConsumerConfig(
            durable_name=subjects.lane_consumer(model, lane),
            filter_subject=subjects.lane_filter(model, lane),
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self.ack_wait_seconds,
            max_deliver=-1,  # The worker limits the attempts, not the consumer.
            max_ack_pending=MAX_ACK_PENDING,
        )
