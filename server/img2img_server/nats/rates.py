"""Rate limits of API keys, which all apis count together.

Each key has a bucket of `per_minute` tokens, which refills evenly within a minute: the generic cell
rate algorithm, with one number for each key, the time at which its bucket is full again. The number
is stored in a key-value bucket of NATS and changes by compare and swap, which is one more write for
each job. Libraries for rate limits count in one process or in a store that this service does not
have.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from img2img_server import clock
from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KeyValue, KvEntry

MINUTE = 60.0


class Rates:
    """Counts the jobs of each key; an api has one for its whole life.

    Args:
        clock: Unix seconds; the clocks of the apis should agree within about a second.
    """

    def __init__(self, values: KeyValue, clock: Callable[[], float] = clock.now) -> None:
        self._values = values
        self._clock = clock
        self._known: dict[str, KvEntry] = {}  # the value that was last read or written
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def take(self, key_id: str, per_minute: int) -> float:
        """Counts a job of the key and returns 0.0, or returns the seconds to wait.

        Raises:
            UnavailableError: NATS is down.
        """
        async with self._turns[key_id]:
            while True:
                entry, full_at, wait = self._next(key_id, per_minute)
                if wait:
                    return wait
                try:
                    value = repr(full_at).encode()
                    revision = await self._values.swap(
                        key_id, value, entry.revision if entry else 0
                    )
                except WrongLastSequenceError:
                    # Another api has counted a job, or the value has expired.
                    await self._read(key_id)
                    continue
                self._known[key_id] = KvEntry(value, revision)
                return 0.0

    def wait(self, key_id: str, per_minute: int) -> float:
        """Returns the seconds to wait by the cached value, or 0.0. Counts nothing."""
        return self._next(key_id, per_minute)[2]

    def _next(self, key_id: str, per_minute: int) -> tuple[KvEntry | None, float, float]:
        """Returns the cached entry, the new full-at time, and the seconds to wait."""
        entry = self._known.get(key_id)
        now = self._clock()
        full_at = max(now, float(entry.value)) if entry else now
        full_at += MINUTE / per_minute
        wait = full_at - now - MINUTE
        # The cached time may be old, but the stored time only grows, so a refusal is right.
        return entry, full_at, wait if wait > 1e-6 else 0.0

    async def _read(self, key_id: str) -> None:
        entry = await self._values.get(key_id)
        if entry is None:
            self._known.pop(key_id, None)
        else:
            self._known[key_id] = entry


def kv_rates(link: NatsConnection) -> Rates:
    """Creates the rates on JetStream; topology.py defines how long a count is kept."""
    return Rates(Bucket(link, subjects.RATES_BUCKET))
