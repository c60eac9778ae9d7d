"""How many calls of each tenant this api has open: what costs memory or holds a stream."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from img2img_server.errors import TooManyCallsError

# The others are small and short; the HTTP contract promises that fetch is never limited.
_COUNTED = frozenset({"Generate", "CreateJob", "WatchJob"})


class OpenCalls:
    """Bounds the open calls of a tenant to `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    def refused(self, method: str, tenant: str) -> TooManyCallsError | None:
        """Why there is no room for one more, if so."""
        if method in _COUNTED and self._open[tenant] >= self._most:
            return TooManyCallsError(self._most)
        return None

    @contextmanager
    def counted(self, method: str, tenant: str) -> Iterator[None]:
        """Counts a call while it lasts. Raises TooManyCallsError."""
        if refused := self.refused(method, tenant):
            raise refused
        if method not in _COUNTED:
            yield
            return
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]

    def count(self, method: str, tenant: str, rpc: asyncio.Task[Any]) -> ExitStack:
        """Counts a call until the stack is closed, or its task has ended.

        Raises:
            TooManyCallsError.
        """
        held = ExitStack()
        held.enter_context(self.counted(method, tenant))
        rpc.add_done_callback(lambda _: held.close())
        return held
