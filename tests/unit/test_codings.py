"""Content-Encoding is read as a list and undone within the byte limit."""

from __future__ import annotations

import gzip
import zlib

import pictures
import pytest

from img2img_server.imaging.codings import (
    CodingError,
    DecodedTooLargeError,
    content_codings,
    decode,
)

PICTURE = pictures.jpeg()
LIMIT = 2**20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("values", "codings"),
    [
        ([], []),
        (["identity"], []),
        (["aws-chunked"], []),
        ([""], []),
        ([" , AWS-Chunked ,, Identity"], []),
        (["aws-chunked,gzip"], ["gzip"]),
        (["GZIP , br"], ["gzip", "br"]),
        (["deflate", "gzip"], ["deflate", "gzip"]),
    ],
)
def test_a_list_of_codings_is_read(values: list[str], codings: list[str]) -> None:
    assert content_codings(values) == codings


@pytest.mark.parametrize(
    ("codings", "sent"),
    [
        ([], PICTURE),
        (["gzip"], gzip.compress(PICTURE)),
        (["x-gzip"], gzip.compress(PICTURE)),
        (["gzip"], gzip.compress(PICTURE[:99]) + gzip.compress(PICTURE[99:])),
        (["deflate"], zlib.compress(PICTURE)),
        (["deflate"], raw_deflate(PICTURE)),
        (["deflate", "gzip"], gzip.compress(zlib.compress(PICTURE))),
        (["gzip"], PICTURE),
        (["br"], PICTURE),
        (["utf-8"], PICTURE),
        (["gzip;q=1"], gzip.compress(PICTURE)),
    ],
)
def test_a_coding_is_undone_or_found_to_be_told_in_error(codings: list[str], sent: bytes) -> None:
    assert decode(sent, codings, LIMIT) == PICTURE


@pytest.mark.parametrize(
    ("codings", "sent", "cause"),
    [
        (["br"], b"\x0b\x02\x80ab\x03", "Content-Encoding br, which is not supported"),
        (["gzip"], gzip.compress(PICTURE)[:-9], "Content-Encoding gzip, but the data is damaged"),
        (["gzip"], b"not gzip", "Content-Encoding gzip, but the data is damaged"),
        (["deflate"], zlib.compress(PICTURE)[:-9], "deflate, but the data is damaged"),
        (["deflate"], b"not deflate", "deflate, but the data is damaged"),
        (["gzip"] * 3, b"", "more than 2 content codings"),
    ],
)
def test_data_that_cannot_be_decoded_is_refused(
    codings: list[str], sent: bytes, cause: str
) -> None:
    with pytest.raises(CodingError, match=cause):
        decode(sent, codings, LIMIT)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_decoding_stops_at_the_limit(coding: str) -> None:
    pack = gzip.compress if coding == "gzip" else zlib.compress
    whole = b"a" * LIMIT
    assert decode(pack(whole), [coding], LIMIT) == whole
    with pytest.raises(DecodedTooLargeError):
        decode(pack(b"a" * (LIMIT + 1)), [coding], LIMIT)
    bomb = pack(bytes(32 * LIMIT))
    with pytest.raises(DecodedTooLargeError):
        decode(pack(bomb), [coding, coding], LIMIT)
