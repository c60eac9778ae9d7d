"""A key-value bucket in the layout that the NATS clients use."""

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
_MARKER: Final = "KV-Operation"  # header of the message by which NATS clients delete a key


@dataclass(frozen=True, slots=True)
class KvEntry:
    """A value and its revision, for compare and swap."""

    value: bytes
    revision: int


class KeyValue(Protocol):
    """The interface of Bucket and MemoryBucket."""

    async def get(self, key: str) -> KvEntry | None: ...

    async def put(self, key: str, value: bytes) -> int: ...

    async def swap(self, key: str, value: bytes, revision: int) -> int: ...

    async def remove(self, key: str) -> None: ...

    async def keys(self, pattern: str = ">") -> list[str]: ...


class Bucket:
    """Values by key. Every method raises UnavailableError when NATS is down."""

    def __init__(self, link: NatsConnection, name: str) -> None:
        self._link = link
        self._name = name
        self._stream = subjects.bucket_stream(name)

    async def get(self, key: str) -> KvEntry | None:
        """Returns the value that was written last, or None."""
        value, revision = await self.latest(key)
        return None if value is None else KvEntry(value, revision)

    async def latest(self, key: str) -> tuple[bytes | None, int]:
        """Returns the value and its revision. Without a value: None and the revision of the
        deletion, or 0 if the key was never written.
        """
        msg = await self._link.last(self._stream, subjects.key_subject(self._name, key))
        if msg is None:
            return None, 0
        return None if _MARKER in (msg.headers or {}) else msg.data or b"", msg.seq or 0

    async def put(self, key: str, value: bytes) -> int:
        """Writes the value whatever the key's revision is; returns the new revision."""
        subject = subjects.key_subject(self._name, key)
        return (await self._link.publish(subject, value, repeatable=True)).seq

    async def swap(self, key: str, value: bytes, revision: int) -> int:
        """Writes if the key is at `revision` (0: it does not exist); returns the new revision.

        Raises:
            WrongLastSequenceError: The key is at another revision.
        """
        subject = subjects.key_subject(self._name, key)
        return await self._link.replace(self._stream, subject, value, revision)

    async def retire(self, key: str, revision: int) -> int:
        """Deletes the value if the key is at `revision` (0: it was never written).

        Returns:
            The revision of the deletion, from which the key can be written again.

        Raises:
            WrongLastSequenceError: The key is at another revision.
        """
        subject = subjects.key_subject(self._name, key)
        deleted = {_MARKER: "DEL"}
        return await self._link.replace(self._stream, subject, b"", revision, deleted)

    async def claim(self, key: str, value: bytes) -> KvEntry:
        """Writes if the key does not exist. Returns the existing entry otherwise."""
        while True:
            try:
                return KvEntry(value, await self.swap(key, value, 0))
            except WrongLastSequenceError:
                entry = await self.get(key)
                if entry is not None:
                    return entry
                # The key expired between the two calls.

    async def remove(self, key: str) -> None:
        """Removes the key and its history, if it exists."""
        subject = subjects.key_subject(self._name, key)
        await self._link.ask(lambda: self._link.js.purge_stream(self._stream, subject=subject))

    async def keys(self, pattern: str = ">") -> list[str]:
        """Returns the keys that match the pattern, in any order."""
        subject = subjects.key_subject(self._name, pattern)
        found: set[str] = set()
        offset, more = 0, True
        while more:
            page = await self._link.ask(partial(self._page, subject, offset))
            found.update(page["state"].get("subjects") or {})
            more = offset + page["limit"] < page["total"]
            # Keys that expire meanwhile move the later ones forward, so the pages overlap.
            offset += page["limit"] - _PAGES_OVERLAP
        start = len(subjects.key_subject(self._name, ""))
        return [each[start:] for each in found]

    async def _page(self, subject: str, offset: int) -> dict[str, Any]:
        """Reads the subjects from the offset on, sorted by name; the server returns at most 100 000
        at once.

        {"total": 100001, "offset": 0, "limit": 100000, "state": {"subjects": {"$KV.b.k": 1, …}, …}}
        """
        request = json.dumps({"subjects_filter": subject, "offset": offset}).encode()
        api = f"$JS.API.STREAM.INFO.{self._stream}"
        msg = await self._link.nc.request(api, request, timeout=REQUEST_SECONDS)
        page: dict[str, Any] = json.loads(msg.data)
        if error := page.get("error"):
            raise nats.js.errors.APIError.from_error(error)
        return page
