"""Spreads the work of many tasks over several iterations of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable


class Turns:
    """Lets at most `most` tasks continue in one iteration of the event loop.

    Without it, an event that a thousand streams wait for takes the loop for the time of a thousand
    sends. grpc accepts one call in an iteration, so new calls would wait for that time each.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    async def turn(self) -> None:
        """Returns when the task may continue, in the order of the calls."""
        if self._left and not self._waiting:
            self._left -= 1
            self._schedule()
            return
        future = asyncio.get_running_loop().create_future()
        self.extend([future])
        await future

    def extend(self, futures: Iterable[asyncio.Future[None]]) -> None:
        """Completes the futures one after the other, each in its turn."""
        self._waiting.extend(futures)
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._is_scheduled = False
        self._left = self._most
        while self._left and self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                self._left -= 1
        if self._left < self._most or self._waiting:
            self._schedule()
