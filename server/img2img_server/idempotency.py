"""Identifies repeated requests: by the id that the caller chose, and by their content."""

from __future__ import annotations

import hashlib
import uuid
from typing import Final

from google.protobuf.message import Message

MAX_KEY_CHARACTERS: Final = 255
_NAMESPACE: Final = uuid.UUID("4b6c9f1e-5d43-4a07-9d0e-6b0f2a6f5c11")


def request_id_of(key: str) -> str:
    """Returns the request_id that an Idempotency-Key stands for: the same UUID for the same key.

    A key that is a UUID is its own request_id. Raises ValueError for an empty key, for one of more
    than 255 characters, and for characters other than printable ASCII.
    """
    key = key.strip()
    if len(key) > 2 and key[0] == key[-1] == '"':  # RFC 8941 puts strings in quotes.
        key = key[1:-1]
    if not 0 < len(key) <= MAX_KEY_CHARACTERS or not key.isascii() or not key.isprintable():
        raise ValueError("an Idempotency-Key has 1 to 255 printable ASCII characters")
    try:
        return str(uuid.UUID(key))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, key))


def fingerprint(message: Message) -> str:
    """Returns a text that is equal for equal requests only."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()
