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
    key = "/".join(link.rsplit("/", 2)[1:])
    if not KEY.fullmatch(key):
        return link
    try:
        chunks = [chunk async for chunk in blobs.read(key)]
    except KeyError:
        return link
    return b"".join(chunks).decode("ascii")
