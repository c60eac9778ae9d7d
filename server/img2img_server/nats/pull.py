"""Pulls messages from durable consumers of one stream and requeues those that the caller does not
get.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

from img2img_server.errors import UnavailableError
from img2img_server.nats.connection import NatsConnection, status_of
from img2img_server.nats.inbox import Interrupted, ReplyInbox

# seconds; longest wait for the server's status that no message is available
STATUS_SECONDS: Final = 1.0
_NO_RESPONDERS: Final = "503"


class Puller:
    """The pull consumers of a stream, which all processes share; each is created on first use."""

    def __init__(self, link: NatsConnection, stream: str) -> None:
        self._link = link
        self._stream = stream
        self._created: set[str] = set()
        self._closing: set[asyncio.Task[None]] = set()

    async def pull(
        self, consumers: Sequence[ConsumerConfig], most: int, timeout_seconds: float
    ) -> list[Msg]:
        """Returns 1 to `most` messages, or none when none came in time.

        Asks each consumer in turn for its waiting messages. If there are none, asks all consumers
        for the next new messages, unless `timeout_seconds` is 0. Messages that arrive while the
        requests end are returned too.
        Those above `most`, and all of them when the caller is cancelled, are requeued.

        Raises:
            UnavailableError: NATS is down, or a consumer was deleted.
        """
        for config in consumers:
            await self._create(config)
        names = [config.durable_name or "" for config in consumers]
        inbox = await self._link.open_inbox(late=self._hand_back)
        taken: list[Msg] = []
        keep = 0
        try:
            with suppress(Interrupted):
                await self._take(inbox, taken, names, most, timeout_seconds)
            if len(taken) < most:
                await inbox.close()
                taken += _messages(inbox.rest())
            keep = most
        finally:
            # Enough messages: the inbox is closed in the background.
            closing = asyncio.create_task(self._close(inbox, taken[keep:]))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            if not keep:  # The caller was cancelled.
                await asyncio.shield(closing)
        return taken[:keep]

    async def _take(
        self,
        inbox: ReplyInbox,
        taken: list[Msg],
        names: Sequence[str],
        most: int,
        timeout_seconds: float,
    ) -> None:
        for name in names:
            await self._request(inbox, name, {"batch": most, "no_wait": True})
            await self._collect(inbox, taken, most, requests=1, seconds=STATUS_SECONDS)
            if taken:
                return
        if timeout_seconds <= 0:
            return
        expires = max(1, int(timeout_seconds * 1e9))
        for name in names:
            await self._request(inbox, name, {"batch": most, "expires": expires})
        seconds = timeout_seconds + STATUS_SECONDS
        await self._collect(inbox, taken, 1, requests=len(names), seconds=seconds)

    async def _request(self, inbox: ReplyInbox, name: str, request: dict[str, int]) -> None:
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{name}"
        await self._link.send(subject, json.dumps(request).encode(), reply=inbox.subject)

    async def _collect(
        self, inbox: ReplyInbox, taken: list[Msg], most: int, *, requests: int, seconds: float
    ) -> None:
        """Takes messages until there are `most` or the server has ended all requests."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(taken) < most and requests:
                    msg = await inbox.get()
                    status = status_of(msg)
                    if status == _NO_RESPONDERS:
                        # The consumer was deleted; the next pull creates it again.
                        self._created.clear()
                        raise UnavailableError
                    if status:
                        requests -= 1
                    else:
                        taken.append(msg)

    async def _close(self, inbox: ReplyInbox, spare: list[Msg]) -> None:
        await inbox.close()
        for msg in spare + _messages(inbox.rest()):
            await self._hand_back(msg)

    async def _hand_back(self, msg: Msg) -> None:
        with suppress(UnavailableError):
            if not status_of(msg):
                await self._link.send(msg.reply, Msg.Ack.Nak)

    async def _create(self, config: ConsumerConfig) -> None:
        name = config.durable_name or ""
        if name not in self._created:
            await self._link.ask(lambda: self._link.js.add_consumer(self._stream, config))
            self._created.add(name)


def _messages(arrived: Sequence[Msg]) -> list[Msg]:
    """Returns the stored messages, without the server's status messages."""
    return [msg for msg in arrived if not status_of(msg)]
