"""Reads the header Retry-After."""

from __future__ import annotations

from datetime import UTC
from email.utils import parsedate_to_datetime


def seconds_of(retry_after: str, now: float) -> float:
    """Returns the seconds that a Retry-After header asks for; 0.0 if it is not well formed.

    Args:
        retry_after: A number of seconds or a date (RFC 9110, section 10.2.3).
        now: Unix seconds.
    """
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
        # The zone -0000 makes no zone, which would mean that of this machine.
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError):  # No timestamp can have this year or offset.
        return 0.0
