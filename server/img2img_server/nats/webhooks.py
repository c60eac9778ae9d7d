"""The outbox on the WEBHOOKS stream: one durable pull consumer for all api pods."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from contextlib import suppress
from typing import Final

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from img2img_server.domain.job import Job
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.webhooks import OutboxFullError, PendingWebhook
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection, status_of
from img2img_server.nats.faults import SubjectFullError
from img2img_server.nats.inbox import Interrupted, ReplyInbox
from img2img_server.nats.kv import Bucket

# Longer than a delivery may take: an api that died in the middle of one leaves it for this long.
ACK_WAIT_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 1.0  # how long the server may take to say that nothing came
_NEXT: Final = f"$JS.API.CONSUMER.MSG.NEXT.{subjects.WEBHOOKS}.{subjects.WEBHOOKS_CONSUMER}"
_NO_RESPONDERS: Final = "503"

log = logging.getLogger(__name__)


class JetStreamPending:
    """A PendingWebhook on JetStream.

    The server counts deliveries; how many of them were no attempts is kept beside it.
    """

    def __init__(
        self, link: NatsConnection, msg: Msg, job: Job, defer: Bucket, times_deferred: int
    ) -> None:
        self._link = link
        self._msg = msg
        self._job = job
        self._deferred = defer
        self.times_deferred = times_deferred

    @property
    def job(self) -> Job:
        return self._job

    @property
    def attempt(self) -> int:
        return int(self._msg.metadata.num_delivered) - self.times_deferred

    async def done(self) -> None:
        await self._link.request(self._msg.reply, Msg.Ack.Ack)

    async def retry(self, delay_seconds: float) -> None:
        # The server keeps the time at which it is due: it outlives a restart of either side.
        delay = json.dumps({"delay": round(delay_seconds * 1e9)}).encode()
        await self._link.request(self._msg.reply, Msg.Ack.Nak + b" " + delay)

    async def defer(self, delay_seconds: float) -> None:
        await self._deferred.put(_put_off_key(self._msg), codec.encode(self.times_deferred + 1))
        await self.retry(delay_seconds)


class JetStreamWebhookOutbox:
    """An WebhookOutbox on JetStream."""

    def __init__(self, link: NatsConnection, *, ack_wait_seconds: float = ACK_WAIT_SECONDS) -> None:
        self._link = link
        self._ack_wait_seconds = ack_wait_seconds
        self._has_consumer = False
        self._deferred = Bucket(link, subjects.DEFERRED_BUCKET)

    async def put(self, job: Job, *, again: bool = False) -> None:
        message_id = f"webhook-{job.id}" + (f"-{uuid.uuid4()}" if again else "")
        try:
            await self._link.publish(
                subjects.webhooks_subject(job.tenant),
                codec.encode(job),
                {"Nats-Msg-Id": message_id},
            )
        except SubjectFullError as error:
            raise OutboxFullError(job.tenant) from error

    async def pull(self, most: int, timeout_seconds: float) -> list[PendingWebhook]:
        await self._ensure_consumer()
        inbox = await self._link.open_inbox(late=self._hand_back)
        taken: list[Msg] = []
        complete = False
        try:
            await self._take(inbox, taken, most, timeout_seconds)
            await inbox.close()  # this ends the request; what was sent until then is ours
            complete = True
        finally:  # cancelled, perhaps twice: what was taken still goes to others at once
            try:
                await inbox.close()
            finally:
                taken += inbox.rest()
                for msg in [] if complete else taken:
                    await self._hand_back(msg)
        return await self._pending([msg for msg in taken if not status_of(msg)])

    async def _take(
        self, inbox: ReplyInbox, taken: list[Msg], most: int, timeout_seconds: float
    ) -> None:
        """Asks for up to `most` and returns at the first, or when the server has ended the wait."""
        request = {"batch": most, "expires": max(1, int(timeout_seconds * 1e9))}
        await self._link.send(_NEXT, json.dumps(request).encode(), reply=inbox.subject)
        with suppress(Interrupted, TimeoutError):
            async with asyncio.timeout(timeout_seconds + ANSWER_SECONDS):
                msg = await inbox.get()
                if status_of(msg) == _NO_RESPONDERS:
                    self._has_consumer = False  # it is gone; the next pull makes it anew
                    raise UnavailableError
                taken.append(msg)

    async def _pending(self, taken: list[Msg]) -> list[PendingWebhook]:
        pending: list[PendingWebhook] = []
        times_deferred = await asyncio.gather(*map(self._times_put_off, taken))
        for msg, times in zip(taken, times_deferred, strict=True):
            try:
                job = codec.decode(msg.data, Job)
                pending.append(JetStreamPending(self._link, msg, job, self._deferred, times))
            except codec.UndecodableError as error:
                log.warning("a webhook that cannot be read is dropped: %s", error)
                await self._link.request(msg.reply, Msg.Ack.Term)
        return pending

    async def _times_put_off(self, msg: Msg) -> int:
        if msg.metadata.num_delivered == 1:
            return 0
        entry = await self._deferred.get(_put_off_key(msg))
        return codec.decode(entry.value, int) if entry else 0

    async def _hand_back(self, msg: Msg) -> None:
        with suppress(UnavailableError):
            if not status_of(msg):
                await self._link.send(msg.reply, Msg.Ack.Nak)

    async def _ensure_consumer(self) -> None:
        if self._has_consumer:
            return
        config = ConsumerConfig(
            durable_name=subjects.WEBHOOKS_CONSUMER,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self._ack_wait_seconds,
            max_deliver=-1,  # whoever delivers bounds the attempts
            max_ack_pending=-1,  # what waits for its next attempt must not hold up the others
        )
        await self._link.ask(lambda: self._link.js.add_consumer(subjects.WEBHOOKS, config))
        self._has_consumer = True


def _put_off_key(msg: Msg) -> str:
    return str(msg.metadata.sequence.stream)
