"""A key-value bucket: the layout the NATS clients use, with exactly the operations we need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import nats.js.errors

from img2img_server.nats import subjects
from img2img_server.nats.connection import REQUEST_SECONDS, NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError

_PAGES_OVERLAP: Final = 1000
_MARKER = "KV-Operation"  # header of what other clients leave where they deleted a key


@dataclass(frozen=True, slots=True)
class KvEntry:
    """A value and the revision to compare and swap with."""

    value: bytes
    revision: int


class KeyValue(Protocol):
    """What Bucket and MemoryBucket have in common."""

    async def get(self, key: str) -> KvEntry | None: ...

    async def put(self, key: str, value: bytes) -> int: ...

    async def swap(self, key: str, value: bytes, revision: int) -> int: ...

    async def remove(self, key: str) -> None: ...

    async def keys(self, pattern: str = ">") -> list[str]: ...


class Bucket:
    """Values by key. Every method raises UnavailableError when the bus is down."""

    def __init__(self, link: NatsConnection, name: str) -> None:
        self._link = link
        self._name = name
        self._stream = subjects.bucket_stream(name)

    async def get(self, key: str) -> KvEntry | None:
        """What was written last, or None."""
        msg = await self._link.last(self._stream, subjects.key_subject(self._name, key))
        if msg is None or _MARKER in (msg.headers or {}):
            return None
        return KvEntry(msg.data or b"", msg.seq or 0)

    async def put(self, key: str, value: bytes) -> int:
        """Writes in any case; returns the revision."""
        subject = subjects.key_subject(self._name, key)
        return (await self._link.publish(subject, value, repeatable=True)).seq

    async def swap(self, key: str, value: bytes, revision: int) -> int:
        """Writes when the key is still at `revision` (0: does not exist); returns the new one.

        Raises:
            WrongLastSequenceError: it is not.
        """
        subject = subjects.key_subject(self._name, key)
        return await self._link.replace(self._stream, subject, value, revision)

    async def claim(self, key: str, value: bytes) -> KvEntry:
        """Writes when there is nothing; returns what is there then."""
        while True:
            try:
                return KvEntry(value, await self.swap(key, value, 0))
            except WrongLastSequenceError:
                entry = await self.get(key)
                if entry is not None:
                    return entry
                # It expired in between: claim again.

    async def remove(self, key: str) -> None:
        """Removes the key without a trace; fine when there is none."""
        subject = subjects.key_subject(self._name, key)
        await self._link.ask(lambda: self._link.js.purge_stream(self._stream, subject=subject))

    async def keys(self, pattern: str = ">") -> list[str]:
        """Keys that match the pattern, in no order."""
        subject = subjects.key_subject(self._name, pattern)
        found: set[str] = set()
        offset, more = 0, True
        while more:
            page = await self._link.ask(partial(self._page, subject, offset))
            found.update(page["state"].get("subjects") or {})
            more = offset + page["limit"] < page["total"]
            # Keys that expire meanwhile move the later ones forward: the pages overlap.
            offset += page["limit"] - _PAGES_OVERLAP
        start = len(subjects.key_subject(self._name, ""))
        return [each[start:] for each in found]

    async def _page(self, subject: str, offset: int) -> dict[str, Any]:
        """Subjects from the offset on, as many as the server tells at once (100 000), by name.

        {"total": 100001, "offset": 0, "limit": 100000, "state": {"subjects": {"$KV.b.k": 1, …}, …}}
        """
        request = json.dumps({"subjects_filter": subject, "offset": offset}).encode()
        api = f"$JS.API.STREAM.INFO.{self._stream}"
        msg = await self._link.nc.request(api, request, timeout=REQUEST_SECONDS)
        page: dict[str, Any] = json.loads(msg.data)
        if error := page.get("error"):
            raise nats.js.errors.APIError.from_error(error)
        return page
