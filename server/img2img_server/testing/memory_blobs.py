"""Files in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

from img2img_server.errors import StorageError
from img2img_server.storage.interface import BlobInfo

CHUNK_BYTES = 64 * 1024


class MemoryBlobStore:
    """A BlobStore in memory. It must be prepared before the first put, as a bucket must exist."""

    def __init__(self) -> None:
        self._prepared = False
        self._files: dict[str, tuple[BlobInfo, bytes]] = {}

    async def prepare(self) -> None:
        self._prepared = True

    async def prove_writable(self) -> None:
        if not self._prepared:
            raise StorageError("the bucket does not exist")

    async def prove_readable(self) -> None:
        return

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        if not self._prepared:
            raise StorageError("the bucket does not exist")
        info = BlobInfo(key=key, size_bytes=len(data), media_type=media_type)
        self._files[key] = (info, bytes(data))

    async def put_url(self, key: str, seconds: int) -> str:
        return f"memory:///{key}"

    def stored_keys(self) -> list[str]:
        """Returns the keys of all files."""
        return list(self._files)

    async def stat(self, key: str) -> BlobInfo | None:
        found = self._files.get(key)
        return found[0] if found else None

    async def read(self, key: str) -> AsyncIterator[bytes]:
        _, data = self._files[key]
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    async def delete(self, key: str) -> None:
        self._files.pop(key, None)
