"""A private subject of one caller."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from img2img_server.wire.faults import DOWN, unavailable

CLOSE_SECONDS: Final = 2.0


class Interrupted(Exception):  # noqa: N818 - not an error: look again
    """The connection was lost and is back: what was asked before will not be answered."""


class Inbox:
    """A private subject and what arrived there, in order. Made by `Link.open_inbox`.

    Beyond `max_bytes` messages are dropped, for readers that notice and ask again.
    """

    def __init__(self, nc: Client, max_bytes: int | None) -> None:
        self.subject = nc.new_inbox()
        self._nc = nc
        self._max_bytes = max_bytes
        self._waiting_bytes = 0
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None

    async def open(self) -> None:
        """Begins to listen. Raises UnavailableError."""
        with unavailable():
            self._subscription = await self._nc.subscribe(self.subject, cb=self._arrive)

    async def _arrive(self, msg: Msg) -> None:
        if self._max_bytes is not None and self._waiting_bytes > self._max_bytes:
            return
        self._waiting_bytes += len(msg.data)
        self._arrived.put_nowait(msg)

    def interrupt(self) -> None:
        """Tells the reader, in its turn, that the connection was away."""
        self._arrived.put_nowait(None)

    async def get(self) -> Msg:
        """The next message. Raises Interrupted."""
        msg = await self._arrived.get()
        if msg is None:
            raise Interrupted
        self._waiting_bytes -= len(msg.data)
        return msg

    async def close(self) -> list[Msg]:
        """Stops listening; returns what arrived and was not read, up to the last message."""
        subscription, self._subscription = self._subscription, None
        with suppress(*DOWN, nats.errors.Error):
            if subscription and self._nc.is_connected:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await subscription.drain()  # type: ignore[no-untyped-call]
            elif subscription:
                await subscription.unsubscribe()
        rest = []
        while not self._arrived.empty():
            msg = self._arrived.get_nowait()
            if msg is not None:
                rest.append(msg)
        return rest
