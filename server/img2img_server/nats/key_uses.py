"""When each API key was used last, in the bucket of the usage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from img2img_server import clock
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KeyValue
from img2img_server.nats.write_later import WriteLater

FLUSH_SECONDS: Final = 30.0
_PREFIX: Final = "key"  # keys of usage begin with a day


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """The value of a key of the bucket, which holds the id only in its encoded form."""

    key_id: str
    last_use_time: float


class KeyUses:
    """The last use of each API key. An api writes those that it has seen every half minute."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket
        self._unwritten: dict[str, float] = {}
        self._later = WriteLater(
            "key_uses", FLUSH_SECONDS, self._write, lambda: bool(self._unwritten)
        )

    def note(self, key_id: str) -> None:
        """Notes a call with the key now."""
        self._unwritten[key_id] = max(clock.now(), self._unwritten.get(key_id, 0.0))
        self._later.changed()

    async def close(self) -> None:
        """Writes the last uses, if NATS can be used."""
        await self._later.close()

    async def read(self) -> Mapping[str, float]:
        """Returns the Unix time of the last use by the id of the key. Raises UnavailableError.

        A key without a use in about two months has no entry.
        """
        found = {}
        for name in await self._bucket.keys(f"{_PREFIX}.*"):
            if known := await self._bucket.get(name):
                entry = codec.decode(known.value, _Entry)
                found[entry.key_id] = entry.last_use_time
        for key_id, seconds in self._unwritten.items():
            found[key_id] = max(seconds, found.get(key_id, 0.0))
        return found

    async def _write(self) -> None:
        for key_id, seconds in list(self._unwritten.items()):
            await self._put(_Entry(key_id=key_id, last_use_time=seconds))
            if self._unwritten.get(key_id) == seconds:
                del self._unwritten[key_id]

    async def _put(self, entry: _Entry) -> None:
        name = f"{_PREFIX}.{subjects.token(entry.key_id)}"
        while True:
            known = await self._bucket.get(name)
            if known and codec.decode(known.value, _Entry).last_use_time >= entry.last_use_time:
                return
            with suppress(WrongLastSequenceError):  # Another api has written.
                await self._bucket.swap(name, codec.encode(entry), known.revision if known else 0)
                return


def kv_key_uses(link: NatsConnection) -> KeyUses:
    """Returns the last uses on JetStream."""
    return KeyUses(Bucket(link, subjects.USAGE_BUCKET))
