"""Paces server-sent events: pings keep a silent stream open, and a stopping gateway ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Final, TypeVar

from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

PING_SECONDS = 15.0
PING: Final = b": ping\n\n"
HEADERS: Final = {"X-Accel-Buffering": "no"}  # A proxy passes each event on at once.
T = TypeVar("T")


async def paced(
    items: AsyncGenerator[T, None], stop: asyncio.Event
) -> AsyncGenerator[T | None, None]:
    """Yields the items, and None after every PING_SECONDS without one.

    Ends after the last item, or when `stop` is set, and closes `items`. Raises what `items` raises.
    """
    end = object()
    stopping = asyncio.ensure_future(stop.wait())
    following: asyncio.Future[Any] = asyncio.ensure_future(anext(items, end))
    try:
        while not stopping.done():
            await asyncio.wait(
                {following, stopping},
                timeout=PING_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if following.done():
                item = following.result()
                if item is end:
                    return
                yield item
                following = asyncio.ensure_future(anext(items, end))
            elif not stopping.done():
                yield None
    finally:
        following.cancel()
        stopping.cancel()
        await asyncio.gather(following, stopping, return_exceptions=True)
        await items.aclose()


class EventStream(EventSourceResponse):
    """A response with events that calls `on_end` after it, however it ends.

    The `finally` of a generator is no place for this call: it does not run if the caller leaves
    before the first event is asked for.
    """

    def __init__(
        self, events: AsyncIterator[bytes], headers: Mapping[str, str], on_end: Callable[[], None]
    ) -> None:
        super().__init__(events, headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
