"""Reads a request's JSON body, its API key and the base URL that it was sent to
(docs/http-contract.md#keys).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.callers import header_key

MAX_BODY_BYTES = 32 * 2**20
# Most clients read the response only after they have sent the whole body. So up to this many bytes
# of a too large body are read and dropped: without that, clients would get a connection reset
# instead of the response.
_MAX_DISCARDED_BYTES = 32 * 2**20
_BODY_SECONDS = 120.0
# Each part of this size must arrive in this time: 8 KiB a second.
_PART_BYTES = 80 * 2**10
_PART_SECONDS = 10.0
# A parsed value takes far more memory than its text, so the values are counted before parsing. One
# of these bytes precedes each value except the first of an object. Bytes inside strings count too:
# prompts and annotations of the greatest length can have 36,000 of them.
_VALUE_STARTS = (b"{", b"[", b",")
MAX_VALUES = 40_000
_MEDIA_TYPE = re.compile(r"[a-z0-9!#$&^_.+-]{1,63}/[a-z0-9!#$&^_.+-]{1,63}")
_SALT = secrets.token_bytes(16)
_HOST = re.compile(r"[A-Za-z0-9._\-\[\]:]{1,255}")


async def read_json(request: Request, takes: str = "application/json") -> dict[str, Any]:
    """Reads the body as a JSON object, whatever Content-Type says; an empty body is {}.

    Args:
        takes: The bodies that the endpoint takes, for the message of an error.

    Raises:
        RequestError: TOO_LARGE, SLOW_BODY, INVALID_JSON (with the reason UNSUPPORTED_MEDIA_TYPE if
            Content-Type names another type), or UNAVAILABLE if the gateway holds too many bodies.
        ClientDisconnect: the client closed the connection.
    """
    raw = await read_body(request)
    body: Any = None
    if sum(map(raw.count, _VALUE_STARTS)) <= MAX_VALUES:
        with suppress(ValueError, RecursionError):
            body = json.loads(raw) if raw.strip() else {}
    if not isinstance(body, dict):
        raise _not_json(request, takes)
    return body


async def read_body(request: Request) -> bytearray:
    """Reads the body, which counts to the tenant of the key in the headers, or to the peer.

    Raises:
        RequestError: TOO_LARGE, SLOW_BODY, or UNAVAILABLE if the gateway holds too many bodies.
        ClientDisconnect: the client closed the connection.
    """
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await _read(request)
    except TimeoutError:
        raise RequestError(ErrorKind.SLOW_BODY, headers={"Connection": "close"}) from None


def media_type_of(request: Request) -> str:
    """Returns the media type of the body in lower case, without parameters; "" if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _not_json(request: Request, takes: str) -> RequestError:
    """Returns the error for a body that is not a JSON object. On our own paths its message names
    the body's media type; on the contract's paths the message is fixed."""
    media_type = media_type_of(request)
    if media_type in ("", "text/plain") or media_type.endswith("json"):
        return RequestError(ErrorKind.INVALID_JSON)
    message = ""
    if request.scope["path"].startswith("/v1/") and _MEDIA_TYPE.fullmatch(media_type):
        message = f"This endpoint takes {takes}; the body is {media_type}"
    return RequestError(ErrorKind.INVALID_JSON, message, reason="UNSUPPORTED_MEDIA_TYPE")


async def _read(request: Request) -> bytearray:
    """Returns the body. Raises RequestError, TimeoutError."""
    text = request.headers.get("content-length", "")
    announced = int(text) if text.isdecimal() else 0
    error: RequestError | None = None
    if announced > MAX_BODY_BYTES:
        error = RequestError(ErrorKind.TOO_LARGE)
        if "expect" in request.headers:  # The client has not sent the body yet.
            raise error
    body = bytearray()
    size = 0
    async for chunk in _parts(request):
        size += len(chunk)
        if size > MAX_BODY_BYTES + _MAX_DISCARDED_BYTES:
            break
        if size > MAX_BODY_BYTES:
            error = RequestError(ErrorKind.TOO_LARGE)
        if not error:
            body += chunk
            try:
                await request.state.body.count(body, announced)
            except RequestError as refused:
                error = refused
        if error:
            body.clear()
            request.state.body.release()
    if error:
        raise error
    return body


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """Yields the body as it arrives. Raises TimeoutError if it arrives too slowly."""
    size = 0
    stream = request.stream()
    # Requests that a client sent together end one after the other: ending them takes time, too.
    seconds = _PART_SECONDS * random.uniform(1.0, 1.5)  # noqa: S311 - spreads load
    async with asyncio.timeout(seconds) as part:
        async for chunk in stream:
            yield chunk
            size += len(chunk)
            if size >= _PART_BYTES:
                size = 0
                part.reschedule(asyncio.get_running_loop().time() + seconds)


def find_key(request: Request, body: Mapping[str, Any]) -> str:
    """Returns the first key that is not empty: of the body, the bearer token, the header `key`, the
    header X-API-Key. Returns "" if there is none, or if the body's key is not a string.

    The request's log line gets a salted hash of the key, so that the lines of one caller can be
    found.
    """
    key = _find_key(request, body)
    request.state.caller = hashlib.blake2s(key.encode(errors="replace"), key=_SALT).hexdigest()[:8]
    return key


def _find_key(request: Request, body: Mapping[str, Any]) -> str:
    in_body = body.get("key")
    if in_body is not None and in_body != "":
        return in_body if isinstance(in_body, str) else ""
    return header_key(request.headers)


def link_base(request: Request, public_base_url: str) -> str:
    """Returns `public_base_url`, else scheme and host of the request, with no slash at the end."""
    if public_base_url:
        return public_base_url.rstrip("/")
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("localhost", None)
        host = f"{name}:{port}" if port else name
    return f"{request.url.scheme}://{host}"
