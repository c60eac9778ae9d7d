"""A private subject for the responses to one caller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from img2img_server.nats.faults import DOWN, unavailable

CLOSE_SECONDS: Final = 2.0


class Interrupted(Exception):  # noqa: N818 - no error: the reader asks again
    """The connection was lost and is open again: requests sent before get no response."""


class ReplyInbox:
    """A private subject and the messages that arrived there. See `NatsConnection.open_inbox`.

    Args:
        max_bytes: Most unread bytes; further messages are dropped, which only readers that detect
            gaps can use.
        late: Receives the messages that arrive after a `close` that was cancelled.
    """

    def __init__(
        self,
        nc: Client,
        *,
        max_bytes: int | None = None,
        late: Callable[[Msg], Awaitable[None]] | None = None,
    ) -> None:
        self.subject = nc.new_inbox()
        self._nc = nc
        self._max_bytes = max_bytes
        self._late = late
        self._waiting_bytes = 0
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._abandoned = False

    async def open(self) -> None:
        """Subscribes. Raises UnavailableError."""
        with unavailable():
            self._subscription = await self._nc.subscribe(self.subject, cb=self._arrive)

    async def _arrive(self, msg: Msg) -> None:
        if self._abandoned:
            if self._late:
                await self._late(msg)
        elif self._max_bytes is None or self._waiting_bytes <= self._max_bytes:
            self._waiting_bytes += len(msg.data)
            self._arrived.put_nowait(msg)

    def interrupt(self) -> None:
        """Makes `get` raise Interrupted, after the messages that arrived before."""
        self._arrived.put_nowait(None)

    async def get(self) -> Msg:
        """Returns the next message. Raises Interrupted."""
        msg = await self._arrived.get()
        if msg is None:
            raise Interrupted
        self._waiting_bytes -= len(msg.data)
        return msg

    def rest(self) -> list[Msg]:
        """Returns the unread messages."""
        rest = []
        while not self._arrived.empty():
            msg = self._arrived.get_nowait()
            if msg is not None:
                rest.append(msg)
        return rest

    async def close(self) -> None:
        """Unsubscribes, after which no message arrives. May be called again."""
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        draining = asyncio.ensure_future(self._drain(subscription))
        try:
            # Unsubscribing continues for up to two seconds if the caller is cancelled.
            await asyncio.shield(draining)
        except asyncio.CancelledError:
            self._abandoned = True
            raise

    async def _drain(self, subscription: Subscription) -> None:
        with suppress(*DOWN, nats.errors.Error):
            if self._nc.is_connected:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await subscription.drain()  # type: ignore[no-untyped-call]
            else:
                await subscription.unsubscribe()
