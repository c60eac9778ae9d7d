"""Finds the tenant of a key before a request is read, so that its costs count to the tenant.

The api checks the key again in every call. So a result may be a few seconds old here: it only
decides which budget is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.datastructures import Headers

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError

MOST_ENTRIES: Final = 4096
_VALID_SECONDS: Final = 10.0
_WRONG_SECONDS: Final = 5.0
_MOST_AT_ONCE: Final = 64  # questions to the api
_MOST_IN_A_BODY: Final = 3  # texts that are tried as the key of one body
_LONGEST: Final = 1100  # bytes of a key in JSON, with its name
_KEY: Final = re.compile(rb'"key"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){1,1030}")')


class Callers:
    """Answers which tenant a key belongs to, from memory or by asking the api.

    Args:
        ask: Returns the tenant of a key. Raises RequestError.
    """

    def __init__(self, ask: Callable[[str], Awaitable[str]]) -> None:
        self._ask = ask
        # The tenant, or "" for a wrong key, and the time until which that is used, by digest.
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._asking = 0

    async def tenant(self, key: str) -> str:
        """Returns the tenant of the key, or "" if the key is wrong or cannot be checked now."""
        if not key:
            return ""
        digest = hashlib.sha256(key.encode(errors="replace")).digest()
        tenant, until = self._known.get(digest, ("", 0.0))
        if time.monotonic() < until:
            return tenant
        if self._asking >= _MOST_AT_ONCE:
            return ""
        self._asking += 1
        try:
            tenant, seconds = await self._ask(key), _VALID_SECONDS
        except RequestError as error:
            if error.kind is not ErrorKind.BAD_KEY:
                return ""
            tenant, seconds = "", _WRONG_SECONDS
        finally:
            self._asking -= 1
        self._known[digest] = tenant, time.monotonic() + seconds
        self._known.move_to_end(digest)
        if len(self._known) > MOST_ENTRIES:
            self._known.popitem(last=False)
        return tenant


class KeySearch:
    """Looks for the field `key` in the JSON text of a body while it arrives.

    A nested field of that name is found, too: a caller with a valid key may use its budget.
    """

    def __init__(self) -> None:
        self._start = 0
        self._tried = 0

    def candidates(self, body: bytearray) -> list[str]:
        """Returns the texts that may be the key, in the part that has arrived since."""
        found: list[str] = []
        while self._tried < _MOST_IN_A_BODY and (match := _KEY.search(body, self._start)):
            self._start = match.end()
            self._tried += 1
            try:
                found.append(json.loads(match[1]))
            except ValueError:
                continue
        self._start = max(self._start, len(body) - _LONGEST)
        return found


def header_key(headers: Headers) -> str:
    """Returns the first key in the headers that is not empty: the bearer token, `key`, X-API-Key;
    or "" if there is none.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("key") or headers.get("x-api-key") or ""
