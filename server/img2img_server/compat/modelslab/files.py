"""The names of the service's own files, and base64 texts in place of links."""

from __future__ import annotations

import re
from collections.abc import Sequence

from img2img_server.storage.interface import BlobStore

_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
KEY = re.compile(rf"(generations|temp)/{_UUID}-[0-9]{{1,2}}\.(png|base64)", re.ASCII)


async def inline(blobs: BlobStore, links: Sequence[str]) -> list[str]:
    """Returns the base64 texts of the linked files. A link to a file elsewhere stays a link.

    Raises:
        StorageError: the bucket cannot be read.
    """
    return [await _text(blobs, link) for link in links]


async def _text(blobs: BlobStore, link: str) -> str:
    content = await read(blobs, link)
    return link if content is None else content.decode("ascii")


async def read(blobs: BlobStore, link: str) -> bytes | None:
    """Returns the content of the linked file, or None for a link to a file elsewhere and for a file
    that was deleted.

    Raises:
        StorageError: the bucket cannot be read.
    """
    key = "/".join(link.rsplit("/", 2)[1:])
    if not KEY.fullmatch(key):
        return None
    try:
        return b"".join([chunk async for chunk in blobs.read(key)])
    except KeyError:
        return None
