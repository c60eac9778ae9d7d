"""Proves that a PNG holds all of its rows; Pillow leaves missing ones black."""

from __future__ import annotations

import struct

from isal import igzip_lib

from img2img_server.imaging.header import Header, HeaderError
from img2img_server.imaging.png import PNG_SIGNATURE

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column, first row, column step, row step of each pass of an interlaced PNG.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
INFLATED_BYTES = 2**18  # at once


def prove_rows(header: Header) -> None:
    """Unpacks and counts the rows of a PNG, without keeping them.

    Raises:
        HeaderError: rows are missing or damaged.
    """
    missing = _row_bytes(header)
    # Pillow judges zlib's header (2 bytes) and checksum.
    unpacker = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE)
    packed = _packed_rows(header.data)[2:]
    while missing > 0 and not unpacker.eof:
        try:
            rows = unpacker.decompress(packed, INFLATED_BYTES)
        except igzip_lib.IsalError as error:  # type: ignore[misc]  # its stub is wrong
            raise HeaderError("its rows are damaged") from error
        packed = b""  # the unpacker keeps what it has not used
        missing -= len(rows)
        if not rows and unpacker.needs_input:
            break
    if missing > 0:
        raise HeaderError("rows are missing")


def _packed_rows(data: bytes) -> bytes:
    offset = len(PNG_SIGNATURE)
    while True:  # header.py wrote one IDAT chunk
        length, kind = struct.unpack_from(">I4s", data, offset)
        if kind == b"IDAT":
            return data[offset + 8 : offset + 8 + length]
        offset += 12 + length


def _row_bytes(header: Header) -> int:
    """Returns the bytes of all rows, each with its filter type in front."""
    assert header.png
    if header.png.colour not in PNG_CHANNELS:
        raise HeaderError("its colour type is invalid")
    bits = header.png.depth * PNG_CHANNELS[header.png.colour]
    total = 0
    for left, upper, across, down in ADAM7 if header.png.interlaced else ((0, 0, 1, 1),):
        columns = -(-(header.width - left) // across)
        rows = -(-(header.height - upper) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
