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
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.domain.violations import SHOWN_CHARACTERS
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
_JSON_KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_TOO_LARGE = (
    f"The body must not be larger than {MAX_BODY_BYTES / 2**20:g} MiB: send a smaller init image, "
    "or its URL"
)
_TOO_MANY_VALUES = f"The body must not have more than {MAX_VALUES} JSON values"
_SLOW_BODY = (
    f"The body must arrive within {_BODY_SECONDS:g} s, and at least {_PART_BYTES / 2**10:g} KiB "
    f"every {_PART_SECONDS:g} s"
)
_MEDIA_TYPE = re.compile(r"[a-z0-9!#$&^_.+-]{1,63}/[a-z0-9!#$&^_.+-]{1,63}")
_SALT = secrets.token_bytes(16)
_HOST = re.compile(r"[A-Za-z0-9._\-\[\]:]{1,255}")


async def read_json(
    request: Request, takes: str = "application/json", *, unique: bool = False
) -> dict[str, Any]:
    """Reads the body as a JSON object, whatever Content-Type says; an empty body is {}.

    Args:
        takes: The bodies that the endpoint takes, for the message of an error.
        unique: Whether a name that an object has twice is an error. Otherwise the last one counts.

    Raises:
        RequestError: TOO_LARGE, SLOW_BODY, INVALID_JSON (with the reason UNSUPPORTED_MEDIA_TYPE if
            Content-Type names another type), or UNAVAILABLE if the gateway holds too many bodies.
        ClientDisconnect: the client closed the connection.
    """
    raw = await read_body(request)
    if sum(map(raw.count, _VALUE_STARTS)) > MAX_VALUES:
        raise _not_json(request, takes, raw, _TOO_MANY_VALUES)
    try:
        body = json.loads(raw, object_pairs_hook=_unique if unique else None) if raw.strip() else {}
    except (ValueError, RecursionError) as error:
        message = f"The body is not valid JSON: {_json_fault(error)}"
        raise _not_json(request, takes, raw, message) from None
    if not isinstance(body, dict):
        kind = _JSON_KINDS.get(type(body), "a number")
        message = f"The body must be a JSON object, and it is {kind}"
        raise _not_json(request, takes, raw, message)
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
        headers = {"Connection": "close"}
        raise RequestError(ErrorKind.SLOW_BODY, _SLOW_BODY, headers=headers) from None


def media_type_of(request: Request) -> str:
    """Returns the media type of the body in lower case, without parameters; "" if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported(request: Request, takes: str) -> RequestError:
    """Returns the error for a body of a kind that the endpoint does not take."""
    media_type = media_type_of(request)
    shown = f"; the body is {media_type}" if _MEDIA_TYPE.fullmatch(media_type) else ""
    message = f"This endpoint takes {takes}{shown}"
    return RequestError(ErrorKind.INVALID_JSON, message, reason="UNSUPPORTED_MEDIA_TYPE")


class _RepeatedNameError(ValueError):
    """An object has a name twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        [(repeated, _)] = counts.most_common(1)
        raise _RepeatedNameError(ascii(repeated[:SHOWN_CHARACTERS]))
    return found


def _json_fault(error: Exception) -> str:
    """Returns why a text is no JSON, and where."""
    match error:
        case json.JSONDecodeError():
            return f"line {error.lineno}, column {error.colno}: {_lower(error.msg)}"
        case UnicodeDecodeError():
            return f"the byte at position {error.start} is not {error.encoding.upper()}"
        case _RepeatedNameError():
            return f"an object has the name {error} twice"
        case RecursionError():
            return "its values are nested too deeply"
        case _:  # Python reads integers of up to 4300 digits.
            return "a number has too many digits"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _not_json(request: Request, takes: str, raw: bytearray, message: str) -> RequestError:
    """Returns the error for a body that is not a JSON object, or that was not meant to be one."""
    media_type = media_type_of(request)
    is_meant = media_type in ("", "text/plain") or media_type.endswith("json")
    # `curl -d` names another type, so the first character counts too.
    if is_meant or raw.lstrip()[:1] == b"{":
        return RequestError(ErrorKind.INVALID_JSON, message)
    return unsupported(request, takes)


async def _read(request: Request) -> bytearray:
    """Returns the body. Raises RequestError, TimeoutError."""
    text = request.headers.get("content-length", "")
    announced = int(text) if text.isdecimal() else 0
    error: RequestError | None = None
    if announced > MAX_BODY_BYTES:
        error = RequestError(ErrorKind.TOO_LARGE, _TOO_LARGE)
        if "expect" in request.headers:  # The client has not sent the body yet.
            raise error
    body = bytearray()
    size = 0
    async for chunk in _parts(request):
        size += len(chunk)
        if size > MAX_BODY_BYTES + _MAX_DISCARDED_BYTES:
            break
        if size > MAX_BODY_BYTES:
            error = RequestError(ErrorKind.TOO_LARGE, _TOO_LARGE)
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
    header X-API-Key. Returns "" if there is none.

    The request's log line gets a salted hash of the key, so that the lines of one caller can be
    found.

    Raises:
        RequestError: BAD_KEY if the body's key is no string.
    """
    in_body = body.get("key")
    is_text = in_body is None or isinstance(in_body, str)
    key = (in_body or header_key(request.headers)) if is_text else ""
    request.state.caller = hashlib.blake2s(key.encode(errors="replace"), key=_SALT).hexdigest()[:8]
    if not is_text:
        raise RequestError(ErrorKind.BAD_KEY, "key must be a text")
    return key


def link_base(request: Request, public_base_url: str) -> str:
    """Returns `public_base_url`, else scheme and host of the request, with no slash at the end."""
    if public_base_url:
        return public_base_url.rstrip("/")
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("localhost", None)
        host = f"{name}:{port}" if port else name
    return f"{request.url.scheme}://{host}"
