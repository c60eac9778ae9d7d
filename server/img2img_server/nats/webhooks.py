"""The webhook outbox on the WEBHOOKS stream: one durable pull consumer for all apis."""

from __future__ import annotations

import json
import logging
import uuid
from dataclasses import dataclass
from typing import Final

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from img2img_server.domain.job import Job
from img2img_server.interfaces.webhooks import OutboxFullError, PendingWebhook
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import SubjectFullError
from img2img_server.nats.pull import Puller

# Longer than a delivery takes; after an api has died, its deliveries are repeated after this time.
ACK_WAIT_SECONDS: Final = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JetStreamPending:
    """A PendingWebhook on JetStream."""

    _link: NatsConnection
    _msg: Msg
    job: Job

    @property
    def deliveries(self) -> int:
        return int(self._msg.metadata.num_delivered)

    async def done(self) -> None:
        await self._link.request(self._msg.reply, Msg.Ack.Ack)

    async def retry(self, delay_seconds: float) -> None:
        # The server stores the delay, so it survives restarts of NATS and of the apis.
        delay = json.dumps({"delay": round(delay_seconds * 1e9)}).encode()
        await self._link.request(self._msg.reply, Msg.Ack.Nak + b" " + delay)


class JetStreamWebhookOutbox:
    """A WebhookOutbox on JetStream."""

    def __init__(self, link: NatsConnection, *, ack_wait_seconds: float = ACK_WAIT_SECONDS) -> None:
        self._link = link
        self._puller = Puller(link, subjects.WEBHOOKS)
        self._config = ConsumerConfig(
            durable_name=subjects.WEBHOOKS_CONSUMER,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ack_wait_seconds,
            max_deliver=-1,  # The dispatcher limits the attempts, not the consumer.
            max_ack_pending=-1,  # Webhooks that wait for their next attempt must not delay others.
        )

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
        pending: list[PendingWebhook] = []
        for msg in await self._puller.pull([self._config], most, timeout_seconds):
            try:
                job = codec.decode(msg.data, Job)
                pending.append(JetStreamPending(self._link, msg, job))
            except codec.UndecodableError as error:
                log.warning("undecodable_webhook_dropped: %s", error)
                await self._link.request(msg.reply, Msg.Ack.Term)
        return pending
