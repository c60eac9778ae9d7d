"""A key-value bucket inside one process: for tests, the same rules as Bucket."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase

from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import KvEntry


class MemoryBucket:
    """Values by key; nothing expires."""

    def __init__(self) -> None:
        self._entries: dict[str, KvEntry] = {}
        self._revisions = itertools.count(1)

    async def get(self, key: str) -> KvEntry | None:
        return self._entries.get(key)

    async def put(self, key: str, value: bytes) -> int:
        self._entries[key] = KvEntry(value, next(self._revisions))
        return self._entries[key].revision

    async def swap(self, key: str, value: bytes, revision: int) -> int:
        there = self._entries.get(key)
        if (there.revision if there else 0) != revision:
            raise WrongLastSequenceError(key)
        return await self.put(key, value)

    async def remove(self, key: str) -> None:
        self._entries.pop(key, None)

    async def keys(self, pattern: str = ">") -> list[str]:
        # A key has no character that fnmatch reads as more than itself.
        return [key for key in self._entries if fnmatchcase(key, pattern.replace(">", "*"))]
