"""What a request says: its body, the key and the address it was sent to (section 3)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError

MAX_BODY_BYTES = 32 * 2**20
# A body that is too long is read on for this much, so that ordinary clients, which read the answer
# only after they have sent everything, get it instead of a reset connection.
_DISCARD_BYTES = 32 * 2**20
_BODY_SECONDS = 120.0
# Values are many times larger parsed than written. Each has one of these before it, the first one
# of its object excepted; those inside of texts count too: all prompts and annotations of the
# longest lengths could have 36 000.
_BEFORE_VALUES = (b"{", b"[", b",")
MAX_VALUES = 40_000
_MEDIA_TYPE = re.compile(r"[a-z0-9!#$&^_.+-]{1,63}/[a-z0-9!#$&^_.+-]{1,63}")
_SALT = secrets.token_bytes(16)
_HOST = re.compile(r"[A-Za-z0-9._\-\[\]:]{1,255}")


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object, whatever Content-Type says; an empty body is {}.

    Raises:
        RequestError: TOO_LARGE, SLOW_BODY or INVALID_JSON, also of one of more than MAX_VALUES;
            INVALID_JSON has the reason UNSUPPORTED_MEDIA_TYPE when Content-Type is another one;
            UNAVAILABLE when all requests together hold as much as the gateway may.
        ClientDisconnect: nobody is left to answer.
    """
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            raw = await _read(request)
    except TimeoutError:
        raise RequestError(ErrorKind.SLOW_BODY, headers={"Connection": "close"}) from None
    if not raw.strip():
        return {}
    if sum(map(raw.count, _BEFORE_VALUES)) > MAX_VALUES:
        raise _no_json(request)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise _no_json(request) from None
    if not isinstance(body, dict):
        raise _no_json(request)
    return body


def _no_json(request: Request) -> RequestError:
    """The refusal of a body that is not a JSON object. The contract fixes the message on its paths;
    on ours the message names the kind of body."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type in ("", "text/plain") or media_type.endswith("json"):
        return RequestError(ErrorKind.INVALID_JSON)
    message = ""
    if request.scope["path"].startswith("/v1/") and _MEDIA_TYPE.fullmatch(media_type):
        message = f"This endpoint takes application/json; the body is {media_type}"
    return RequestError(ErrorKind.INVALID_JSON, message, reason="UNSUPPORTED_MEDIA_TYPE")


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    refused: ErrorKind | None = None
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        refused = ErrorKind.TOO_LARGE
        if "expect" in request.headers:  # the client waits for our word
            raise RequestError(refused)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES + _DISCARD_BYTES:
            break
        if size > MAX_BODY_BYTES:
            refused = ErrorKind.TOO_LARGE
        elif refused is None and not request.state.body.take(len(chunk)):
            refused = ErrorKind.UNAVAILABLE
        if refused:
            chunks.clear()
            forget_body(request)
        else:
            chunks.append(chunk)
    if refused:
        raise RequestError(refused, retry_seconds=1)
    return b"".join(chunks)


def forget_body(request: Request) -> None:
    """For who has let go of the body and goes on: others may have its room."""
    request.state.body.forget()


def find_key(request: Request, body: Mapping[str, Any]) -> str:
    """The first key that is not empty: body, bearer token, header key, header X-API-Key.

    Empty when there is none. A key of the body that is no string is a wrong key, not an absent one.
    The request's log line gets a salted hash of it, so that a caller's lines can be told apart.
    """
    key = _find_key(request, body)
    request.state.caller = hashlib.blake2s(key.encode(errors="replace"), key=_SALT).hexdigest()[:8]
    return key


def _find_key(request: Request, body: Mapping[str, Any]) -> str:
    in_body = body.get("key")
    if in_body is not None and in_body != "":
        return in_body if isinstance(in_body, str) else ""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("key") or request.headers.get("x-api-key") or ""


def link_base(request: Request, public_base_url: str) -> str:
    """The setting, else scheme and host of the request; without a slash at the end."""
    if public_base_url:
        return public_base_url.rstrip("/")
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        name, port = request.scope.get("server") or ("localhost", None)
        host = f"{name}:{port}" if port else name
    return f"{request.url.scheme}://{host}"
