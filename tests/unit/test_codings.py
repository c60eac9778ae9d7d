"""Content-Encoding headers are read as a list, and codings are removed within the limit of
bytes.
"""

from __future__ import annotations

import gzip
import zlib

import photos
import pytest

from img2img_server.imaging.codings import (
    MAX_GZIP_MEMBERS,
    CodingError,
    DecodedTooLargeError,
    content_codings,
    decode,
)

IMAGE = photos.jpeg()
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
        ([], IMAGE),
        (["gzip"], gzip.compress(IMAGE)),
        (["x-gzip"], gzip.compress(IMAGE)),
        (["gzip"], gzip.compress(IMAGE[:99]) + gzip.compress(IMAGE[99:])),
        (["gzip"], gzip.compress(b"") * (MAX_GZIP_MEMBERS - 1) + gzip.compress(IMAGE) + bytes(9)),
        (["deflate"], zlib.compress(IMAGE)),
        (["deflate"], raw_deflate(IMAGE)),
        (["deflate", "gzip"], gzip.compress(zlib.compress(IMAGE))),
        (["gzip"], IMAGE),
        (["br"], IMAGE),
        (["utf-8"], IMAGE),
        (["gzip;q=1"], gzip.compress(IMAGE)),
    ],
)
def test_a_coding_is_decoded_or_reported_as_wrong(codings: list[str], sent: bytes) -> None:
    assert decode(sent, codings, LIMIT) == IMAGE


@pytest.mark.parametrize(
    ("codings", "sent", "cause"),
    [
        (["br"], b"\x0b\x02\x80ab\x03", "Content-Encoding br, which is not supported"),
        (["gzip"], gzip.compress(IMAGE)[:-9], "Content-Encoding gzip, but the data is damaged"),
        (["gzip"], b"not gzip", "Content-Encoding gzip, but the data is damaged"),
        (["deflate"], zlib.compress(IMAGE)[:-9], "deflate, but the data is damaged"),
        (["deflate"], b"not deflate", "deflate, but the data is damaged"),
        (["gzip"] * 3, b"", "more than 2 content codings"),
        (["gzip"], gzip.compress(b"") * (MAX_GZIP_MEMBERS + 1), "more than 64 gzip members"),
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
