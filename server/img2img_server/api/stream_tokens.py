"""Tokens that allow to watch one job for a while, for browsers: an EventSource sends no headers.

A token is "i2t_" and, in URL-safe base64, the tenant, the id of the API key that made it, the id of
the job and the Unix time of its end, followed by their HMAC-SHA256. Nothing is stored: every api
with the same keys verifies a token, and a token is refused once its API key is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import replace
from typing import Final

from img2img_server import clock
from img2img_server.api.keys import KeyRing, Principal
from img2img_server.errors import StreamTokenExpiredError, StreamTokenKeysMissingError
from img2img_server.settings import STREAM_PREFIX, SettingsError

METHOD: Final = "WatchJob"  # the only method that takes a token
LEAST_CHARACTERS: Final = 32  # of a key
_PURPOSE: Final = b"img2img stream token 1\n"
_MAC_BYTES: Final = 32
_FACTS: Final = re.compile(r"([a-z0-9-]{1,63})/([a-z0-9._-]{1,63})/([0-9]{1,12})/([0-9]{1,12})")


class StreamTokens:
    """Makes and verifies tokens.

    Args:
        keys: The setting stream_token_keys: the first one signs, all verify. Empty: no tokens.
        seconds: How long a token is valid.
        ring: The API keys.

    Raises:
        SettingsError: A key is too short.
    """

    def __init__(self, keys: str, seconds: float, ring: KeyRing) -> None:
        self._keys = parse_keys(keys)
        self._seconds = seconds
        self._ring = ring

    def make(self, principal: Principal, job_id: int) -> tuple[str, float]:
        """Returns a token for the job, and the Unix time of its end.

        Raises:
            StreamTokenKeysMissingError: The operator has set no keys.
        """
        if not self._keys:
            raise StreamTokenKeysMissingError
        end = int(clock.now() + self._seconds)
        facts = f"{principal.tenant}/{principal.key_id}/{job_id}/{end}".encode()
        signed = facts + _mac(self._keys[0], facts)
        return STREAM_PREFIX + base64.urlsafe_b64encode(signed).decode().rstrip("="), float(end)

    def authenticate(self, token: str, method: str) -> Principal | None:
        """Returns the principal of a valid token, which may watch one job only.

        Returns None for any other text, for another method, and if the API key is not valid now.

        Raises:
            StreamTokenExpiredError: The token was valid once.
        """
        if method != METHOD or not token.startswith(STREAM_PREFIX) or not token.isascii():
            return None
        text = token.removeprefix(STREAM_PREFIX)
        try:
            signed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (binascii.Error, ValueError):
            return None
        facts, mac = signed[:-_MAC_BYTES], signed[-_MAC_BYTES:]
        if not any(hmac.compare_digest(_mac(key, facts), mac) for key in self._keys):
            return None
        found = _FACTS.fullmatch(facts.decode("latin-1"))
        if found is None:
            return None
        tenant, key_id, job_id, end = found.groups()
        maker = self._maker(tenant, key_id)
        if maker is None:
            return None
        if int(end) <= clock.now():
            raise StreamTokenExpiredError
        return replace(maker, permissions=frozenset(), only_job=int(job_id))

    def _maker(self, tenant: str, key_id: str) -> Principal | None:
        for principal in self._ring.principals():
            if (principal.tenant, principal.key_id) == (tenant, key_id):
                return None if principal.has_expired else principal
        return None


def parse_keys(text: str) -> list[bytes]:
    """Returns the keys of the setting stream_token_keys. Raises SettingsError."""
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if any(len(key) < LEAST_CHARACTERS for key in keys):
        raise SettingsError(
            f"IMG2IMG_STREAM_TOKEN_KEYS: every key must have at least {LEAST_CHARACTERS} characters"
        )
    return [key.encode() for key in keys]


def _mac(key: bytes, facts: bytes) -> bytes:
    return hmac.digest(key, _PURPOSE + facts, hashlib.sha256)
