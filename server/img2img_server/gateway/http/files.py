"""The files behind the links: /generations/ and /temp/, streamed from the bucket (section 7)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from img2img_server.compat.modelslab.files import KEY
from img2img_server.errors import StorageError
from img2img_server.gateway.modelslab.errors import RETRY_SECONDS, ErrorKind
from img2img_server.storage.interface import BlobStore

_FOLDERS = ("generations/", "temp/")
_MEDIA_TYPES = {"png": "image/png", "base64": "text/plain"}
_READY_SECONDS = 2.0
_NO_STORE = {"Cache-Control": "no-store"}
# A file never changes, but it goes a day after its job.
_HEADERS = {
    "Cache-Control": "public, max-age=3600, immutable",
    "X-Content-Type-Options": "nosniff",
}
log = structlog.get_logger()


class Files:
    """Serves what the workers stored in the service's own bucket."""

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs

    async def serve(self, request: Request) -> Response:
        """GET and HEAD of one file. A file that is not there (yet) is an uncached 404, never HTML.

        Only names of our own making are looked up.
        """
        key = request.scope["path"].removeprefix("/")
        if not KEY.fullmatch(key):
            return missing()
        try:
            info = await self.blobs.stat(key)
            if info is None:
                return missing()
            media_type = _MEDIA_TYPES[key.rpartition(".")[2]]
            headers = {**_HEADERS, "Content-Length": str(info.size_bytes)}
            if request.method == "HEAD":
                return Response(headers=headers, media_type=media_type)
            chunks = self.blobs.read(key)
            first = await anext(chunks, b"")  # errors come before the first byte of the answer
            return StreamingResponse(_chain(first, chunks), headers=headers, media_type=media_type)
        except KeyError:
            return missing()
        except StorageError as error:
            log.warning("file not served", key=key, error=str(error))
            headers = {**_NO_STORE, "Retry-After": str(RETRY_SECONDS)}
            return PlainTextResponse(ErrorKind.UNAVAILABLE.message, 503, headers)

    async def trouble(self) -> str:
        """Why the bucket cannot be read, or nothing."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self.blobs.prove_readable()
        except TimeoutError:
            return "no answer in time"
        except StorageError as error:
            return str(error)
        return ""


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


def is_file_path(path: str) -> bool:
    """Whether a path lies where files are."""
    return path.removeprefix("/").startswith(_FOLDERS)


def missing() -> Response:
    """What a file link answers before the file is there and after it has gone."""
    return PlainTextResponse("Not found\n", 404, _NO_STORE)
