"""Serves the files behind the links, /generations/ and /temp/, from the bucket
(docs/http-contract.md#files)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import structlog
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from img2img_server.compat.modelslab.errors import RETRY_SECONDS, ErrorKind
from img2img_server.compat.modelslab.files import KEY
from img2img_server.errors import StorageError
from img2img_server.storage.interface import CACHE_CONTROL, BlobStore

_MEDIA_TYPES = {"png": "image/png", "base64": "text/plain"}
_NO_STORE = {"Cache-Control": "no-store"}
log = structlog.get_logger()


class Files:
    """Serves files that the workers have stored in the service's own bucket."""

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs

    async def serve(self, request: Request, name: str) -> Response:
        """Returns a result: {file_prefix}-{index}.png, or its base64 text. Status 404 while it is
        not stored, 503 while the bucket cannot be read."""
        key = request.scope["path"].removeprefix("/")
        if not KEY.fullmatch(key):
            return missing()
        try:
            info = await self.blobs.stat(key)
            if info is None:
                return missing()
            media_type = _MEDIA_TYPES[key.rpartition(".")[2]]
            headers = {
                "Cache-Control": CACHE_CONTROL,
                "X-Content-Type-Options": "nosniff",
                "Content-Length": str(info.size_bytes),
            }
            if request.method == "HEAD":
                return Response(headers=headers, media_type=media_type)
            chunks = self.blobs.read(key)
            first = await anext(chunks, b"")  # The first read raises before the response begins.
            return StreamingResponse(_chain(first, chunks), headers=headers, media_type=media_type)
        except KeyError:
            return missing()
        except StorageError as error:
            log.warning("file_unavailable", key=key, error=str(error))
            headers = {**_NO_STORE, "Retry-After": str(RETRY_SECONDS)}
            return PlainTextResponse(ErrorKind.UNAVAILABLE.message, 503, headers)


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


def is_file_path(path: str) -> bool:
    """Returns whether the path is below a folder of files."""
    return path.startswith(("/generations/", "/temp/"))


def missing() -> Response:
    """Returns the response for a link whose file is not stored yet or was deleted."""
    return PlainTextResponse("Not found\n", 404, _NO_STORE)
