"""How fast each key makes jobs, counted together by every api.

A bucket of `per_minute` tokens for each key, filled evenly within a minute (the generic cell rate
algorithm: one number for each key, the moment at which its bucket is full again). The number lies
in a key-value bucket of the bus and changes by compare and swap: apis that share a bus share the
count, and what one of them did cannot be overlooked by another. That is one more write for each
job. Libraries for rate limits keep their counts in one process or in an engine that this service
does not have.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KeyValue, KvEntry

MINUTE = 60.0


class Rates:
    """One for the life of an api.

    Args:
        clock: Unix seconds; those of the apis should agree within a second or so.
    """

    def __init__(self, values: KeyValue, clock: Callable[[], float] = time.time) -> None:
        self._values = values
        self._clock = clock
        self._known: dict[str, KvEntry] = {}  # what was last read or written
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def take(self, key_id: str, per_minute: int) -> float:
        """Counts a job of the key and returns 0.0, or the seconds until there is room for it.

        Raises:
            UnavailableError: the bus is down.
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
                except WrongLastSequenceError:  # another api counted, or it has expired
                    await self._read(key_id)
                    continue
                self._known[key_id] = KvEntry(value, revision)
                return 0.0

    def wait(self, key_id: str, per_minute: int) -> float:
        """What `take` would return, as far as this api knows; counts and asks nothing."""
        return self._next(key_id, per_minute)[2]

    def _next(self, key_id: str, per_minute: int) -> tuple[KvEntry | None, float, float]:
        """What is known, when the bucket is full again after one more, the wait for that one."""
        entry = self._known.get(key_id)
        now = self._clock()
        full_at = max(now, float(entry.value)) if entry else now
        full_at += MINUTE / per_minute
        wait = full_at - now - MINUTE
        # What is known may be old, but the moment only moves on: a refusal stands.
        return entry, full_at, wait if wait > 1e-6 else 0.0

    async def _read(self, key_id: str) -> None:
        entry = await self._values.get(key_id)
        if entry is None:
            self._known.pop(key_id, None)
        else:
            self._known[key_id] = entry


def kv_rates(link: NatsConnection) -> Rates:
    """On JetStream; see topology.py for how long a count is kept."""
    return Rates(Bucket(link, subjects.RATES_BUCKET))
