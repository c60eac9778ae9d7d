"""The interface to the files of the service's own bucket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Protocol

# Cache-Control of every file, from the bucket and from the gateway. A link needs no API key, so a
# shared cache could serve the image to others and after its deletion. Browsers may cache a file,
# since it never changes.
CACHE_CONTROL: Final = "private, max-age=3600, immutable"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    """A stored file."""

    key: str
    size_bytes: int
    media_type: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a bucket. `tag`: the store's ETag, which changes with the content."""

    key: str
    tag: str
    size_bytes: int


class BlobStore(Protocol):
    """Files by key, such as "generations/{uuid}-0.png", in the service's own bucket."""

    async def prepare(self) -> None:
        """Prepares the store for `put`. Raises StorageError, SettingsError."""
        ...

    async def prove_writable(self) -> None:
        """Stores a small file and removes it again. Raises StorageError."""
        ...

    async def prove_readable(self) -> None:
        """Requests a file that does not exist. Raises StorageError."""
        ...

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        """Stores a file atomically: no reader sees a part of it. Raises StorageError."""
        ...

    async def put_url(self, key: str, seconds: int) -> str:
        """Returns a URL that takes the file with one PUT for so long. Raises StorageError.

        The size and the content that are sent are not limited.
        """
        ...

    async def stat(self, key: str) -> BlobInfo | None:
        """Returns size and media type of the file, or None. Raises StorageError."""
        ...

    def read(self, key: str) -> AsyncIterator[bytes]:
        """Yields the file in chunks. Raises KeyError when it does not exist, StorageError."""
        ...

    async def delete(self, key: str) -> None:
        """Removes a file, if it exists. Raises StorageError.

        Waits for cancelled puts of this file that still run in this process.
        """
        ...
