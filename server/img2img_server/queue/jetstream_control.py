"""Commands to every worker, over plain NATS subjects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import nats.errors
from nats.aio.msg import Msg

from img2img_server.wire import names
from img2img_server.wire.connection import Link
from img2img_server.wire.faults import unavailable

log = logging.getLogger(__name__)


class NatsControl:
    """A Control on core NATS: who listens hears it, nothing is kept."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def cancel(self, job_id: int) -> None:
        """Raises UnavailableError."""
        await self._link.send(names.CANCEL_SUBJECT, str(job_id).encode())
        with unavailable():
            await self._link.nc.flush(timeout=2)

    @asynccontextmanager
    async def on_cancel(self, handler: Callable[[int], Awaitable[None]]) -> AsyncIterator[None]:
        """Raises UnavailableError on entering."""

        async def receive(msg: Msg) -> None:
            try:
                await handler(int(msg.data))
            except Exception:  # the next command must still be heard
                log.exception("cancel %r", msg.data)

        await self._link.ready()
        with unavailable():
            subscription = await self._link.nc.subscribe(names.CANCEL_SUBJECT, cb=receive)
            await self._link.nc.flush(timeout=2)  # from here on the server knows us
        try:
            yield
        finally:
            with suppress(nats.errors.Error, asyncio.TimeoutError):
                await subscription.unsubscribe()
