"""Decodes data URIs (RFC 2397) and base64, as callers and browsers write them."""

from __future__ import annotations

import binascii
import re

_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\f\v"
_SCHEME = re.compile(r"\s*data:", re.I | re.A)
_MARK = re.compile(r',|"|%22')
_BASE64 = re.compile(r"(?:^|;) *base64 *$", re.I | re.A)
_MOST_HEAD_CHARACTERS = 1024
_LONE_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_MOST_LONE_PERCENTS = 1024
# A value for data that cannot be decoded. The image is checked only after the key, the other fields
# and the queue.
NO_IMAGE = b"\x00"


def is_data_uri(text: str) -> bool:
    """Returns whether the text begins with the scheme `data:`, in any case."""
    return _SCHEME.match(text) is not None


def decode_data_uri(text: str) -> bytes:
    """Returns the data of a data URI. Ignores the media type and the fragment.

    Raises:
        ValueError: the URI has no comma, its data is not base64 although the URI declares it, or
            many percent signs encode nothing.
    """
    scheme = _SCHEME.match(text)
    if scheme is None:
        raise ValueError("not a data URI")
    start = scheme.end()
    comma = _end_of_head(text, start)
    data = text[comma + 1 :].partition("#")[0]
    if _BASE64.search(text[start:comma]):
        return decode_base64(data)
    return _percent_decoded(data.strip())


def _end_of_head(text: str, start: int) -> int:
    """Returns the place of the comma before the data.

    This is the first comma outside of quoted strings, whose quotes are mostly percent-encoded. If a
    quoted string has no end, it is the first comma of the URI.
    """
    first, quoted = -1, False
    for mark in _MARK.finditer(text, start, start + _MOST_HEAD_CHARACTERS):
        if mark[0] != ",":
            quoted = not quoted
            continue
        if not quoted:
            return mark.start()
        first = mark.start() if first < 0 else first
    if first < 0:
        raise ValueError("a data URI without a comma")
    return first


def decode_base64(text: str) -> bytes:
    """Returns decoded base64: either alphabet, padded or not, with white space, percent-encoded.

    Raises:
        ValueError: other characters, or a length that base64 does not have.
    """
    try:
        data = _percent_decoded(text)
        data = data.translate(_URL_SAFE_TO_STANDARD, _WHITE_SPACE).rstrip(b"=")
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except ValueError as error:
        raise ValueError("not base64") from error


def _percent_decoded(text: str) -> bytes:
    """Returns the bytes of percent-encoded text, as urllib.parse.unquote_to_bytes does.

    That function takes 5 s and 2 GB for the largest request body if it is percent-encoded. Here the
    decoder of quoted-printable does the work: it differs only in the sign and takes half a second.
    """
    data = text.encode()
    if b"%" not in data:
        return data
    data = data.replace(b"=", b"%3D")
    data, lone = _LONE_PERCENT.subn(b"%25", data, _MOST_LONE_PERCENTS + 1)
    if lone > _MOST_LONE_PERCENTS:
        raise ValueError("too many percent signs that encode nothing")
    return binascii.a2b_qp(data.replace(b"%", b"="))
