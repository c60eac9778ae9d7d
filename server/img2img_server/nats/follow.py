"""Reads a subject of a stream in order and without gaps, despite reconnects and lost messages."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final, Self

import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from img2img_server.errors import UnavailableError
from img2img_server.nats.connection import NatsConnection, status_of
from img2img_server.nats.inbox import Interrupted, ReplyInbox

HEARTBEAT_SECONDS: Final = 2.0
RETRY_SECONDS: Final = 1.0
MAX_WAITING_BYTES: Final = 32 * 2**20  # most unread bytes of a slow reader
_HEARTBEAT: Final = "100"

log = logging.getLogger(__name__)


class _GapError(Exception):
    """A message was lost: the server's sequence numbers have a gap."""


class Follower:
    """Iterates over all messages of `subject`, the stored ones first, then new ones; never ends.

    `start` creates a push consumer without acks, so no later message is missed. The server numbers
    the messages; after a gap, a silence or a reconnect a new consumer starts after the last message
    that arrived.
    """

    def __init__(self, link: NatsConnection, stream: str, subject: str) -> None:
        self._link = link
        self._stream = stream
        self._subject = subject
        self._inbox: ReplyInbox | None = None
        self._consumer = ""
        self._last_stream_sequence = 0
        self._delivered = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Returns the data of the next message."""
        while True:
            try:
                data = await self._next()
            except (_GapError, Interrupted, TimeoutError) as reason:
                log.debug("stream_read_again: %s: %r", self._subject, reason)
                await self._restart()
            else:
                if data is not None:
                    return data

    async def _next(self) -> bytes | None:
        if self._inbox is None:  # The restart was cancelled.
            raise Interrupted
        async with asyncio.timeout(2.5 * HEARTBEAT_SECONDS):
            msg = await self._inbox.get()
        if status_of(msg):
            self._check_heartbeat(msg)
            return None
        count = msg.metadata.sequence
        if count.consumer != self._delivered + 1:
            raise _GapError
        self._delivered = count.consumer
        self._last_stream_sequence = count.stream
        return msg.data

    def _check_heartbeat(self, msg: Msg) -> None:
        headers = msg.headers or {}
        sent = int(headers.get("Nats-Last-Consumer", self._delivered))
        if status_of(msg) != _HEARTBEAT or sent != self._delivered:
            raise _GapError

    async def start(self) -> None:
        """Subscribes. Raises UnavailableError; `stop` must be called in this case too."""
        self._inbox = await self._link.open_inbox(max_bytes=MAX_WAITING_BYTES)
        config = ConsumerConfig(
            deliver_subject=self._inbox.subject,
            filter_subject=self._subject,
            ack_policy=AckPolicy.NONE,
            max_deliver=1,
            idle_heartbeat=HEARTBEAT_SECONDS,
            inactive_threshold=2 * HEARTBEAT_SECONDS,
            mem_storage=True,
            num_replicas=1,
        )
        if self._last_stream_sequence:
            config.deliver_policy = DeliverPolicy.BY_START_SEQUENCE
            config.opt_start_seq = self._last_stream_sequence + 1
        info = await self._link.ask(lambda: self._link.js.add_consumer(self._stream, config))
        self._consumer, self._delivered = info.name, 0

    async def stop(self) -> None:
        """Unsubscribes."""
        inbox, self._inbox = self._inbox, None
        consumer, self._consumer = self._consumer, ""
        if consumer and self._link.nc.is_connected:
            # The server deletes a consumer without a subscriber by itself, but later.
            api = f"$JS.API.CONSUMER.DELETE.{self._stream}.{consumer}"
            with suppress(UnavailableError):
                await self._link.send(api, b"", reply=self._link.nc.new_inbox())
        if inbox:
            await inbox.close()

    async def _restart(self) -> None:
        while True:
            await self.stop()
            try:
                return await self.start()
            except (UnavailableError, nats.js.errors.APIError) as error:
                log.debug("stream_not_readable: %s: %r", self._subject, error)
                await asyncio.sleep(RETRY_SECONDS)
