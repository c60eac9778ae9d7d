"""Limits the open event streams of an api, and keeps places for tenants that have few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from img2img_server import errors
from img2img_server.telemetry import WATCHERS

RESERVE_SHARE: Final = 4  # the reserve is this part of the other places
TENANT_SHARE: Final = 8  # a tenant has fewer places than this part of the free reserve


class StreamPlaces:
    """The places for event streams: `most`, and a reserve of a quarter of that number.

    A tenant may take any free place of the first. When these are taken, a tenant gets a place of
    the reserve while it has fewer streams than an eighth of the places that are still free. So
    tenants with many streams cannot use up the places of a tenant that has none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._all = most + max(1, most // RESERVE_SHARE)
        self._open: Counter[str] = Counter()

    @contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """Takes a place during the body. Raises TooManyWatchersError."""
        total = self._open.total()
        few = self._open[tenant] * TENANT_SHARE < self._all - total
        if total >= self._most and not few:
            raise errors.TooManyWatchersError(self._most)
        self._open[tenant] += 1
        WATCHERS.inc()
        try:
            yield
        finally:
            WATCHERS.dec()
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]
