"""Undoes the Content-Encoding of a downloaded file, within a byte limit."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from img2img_server.imaging.header import container_of

# Names that mean no coding. aws-chunked is the framing of uploads, but some stores name it in
# downloads.
_NO_CODINGS = frozenset({"", "identity", "aws-chunked"})
_GZIP = b"\x1f\x8b\x08"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS  # zlib's value for a gzip header and its checksum
MAX_CODINGS = 2
# A file of 20 MB can have a million empty members, which would take seconds.
MAX_GZIP_MEMBERS = 64


class CodingError(Exception):
    """The coding is not supported or the data is damaged; a clause for the caller."""


class DecodedTooLargeError(Exception):
    """The decoded data exceeds the limit."""


def content_codings(values: Iterable[str]) -> list[str]:
    """Returns the codings that Content-Encoding headers list, in the order they were applied.

    Args:
        values: One entry for each header; each is a list by itself.
    """
    listed = (part.strip().lower() for value in values for part in value.split(","))
    return [coding for coding in listed if coding not in _NO_CODINGS]


def decode(data: bytes, codings: list[str], limit: int) -> bytes:
    """Returns the data without its codings. CPU-bound: up to `limit` bytes for each coding.

    The first bytes override the header: data that begins like an image is returned unchanged, and
    data that begins like a gzip file is unpacked.

    Raises:
        CodingError: a coding is unknown, there are too many, or the data is damaged or cut.
        DecodedTooLargeError: more than `limit` bytes.
    """
    if len(codings) > MAX_CODINGS:
        raise CodingError(f"the server sent it with more than {MAX_CODINGS} content codings")
    for coding in reversed(codings):
        if container_of(data):
            break
        try:
            data = _decode_one(data, coding, limit + 1)
        except (EOFError, zlib.error) as error:
            cause = f"the server sent it with Content-Encoding {coding}, but the data is damaged"
            raise CodingError(cause) from error
        if len(data) > limit:
            raise DecodedTooLargeError
    return data


def _decode_one(data: bytes, coding: str, most: int) -> bytes:
    """Removes one coding. Returns at most `most` bytes."""
    if coding in ("gzip", "x-gzip") or data.startswith(_GZIP):
        return _gunzip(data, most)
    if coding == "deflate":
        try:
            return _inflate(data, zlib.MAX_WBITS, most)
        except zlib.error:  # Many servers send deflate data without the zlib header.
            return _inflate(data, -zlib.MAX_WBITS, most)
    shown = coding[:20] if coding.isprintable() else "?"
    raise CodingError(f"the server sent it with Content-Encoding {shown}, which is not supported")


def _gunzip(data: bytes, most: int) -> bytes:
    """Unpacks the members of a gzip file, which may have zeros between and after them."""
    out, members = b"", 0
    while data and len(out) < most:
        members += 1
        if members > MAX_GZIP_MEMBERS:
            raise CodingError(f"the server sent it in more than {MAX_GZIP_MEMBERS} gzip members")
        inflater = zlib.decompressobj(_GZIP_WINDOW)
        out += inflater.decompress(data, most - len(out))
        if not inflater.eof and len(out) < most:
            raise EOFError
        data = inflater.unused_data.lstrip(b"\0")
    return out


def _inflate(data: bytes, window_bits: int, most: int) -> bytes:
    inflater = zlib.decompressobj(window_bits)
    out = inflater.decompress(data, most)
    if not inflater.eof and len(out) < most:
        raise EOFError
    return out
