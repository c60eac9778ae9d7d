"""Proves that a PNG holds all of its rows; Pillow leaves missing ones black."""

from __future__ import annotations

import struct

from isal import isal_zlib

from img2img_server.images.header import PNG_SIGNATURE, Header, HeaderError

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
    inflate = isal_zlib.decompressobj()
    offset = len(PNG_SIGNATURE)
    while missing > 0 and offset < len(header.data):
        length, kind = struct.unpack_from(">I4s", header.data, offset)
        packed = header.data[offset + 8 : offset + 8 + length] if kind == b"IDAT" else b""
        while packed and missing > 0 and not inflate.eof:
            try:
                missing -= len(inflate.decompress(packed, INFLATED_BYTES))
            except isal_zlib.IsalError as error:  # type: ignore[misc]  # isal's stub is wrong
                raise HeaderError("rows are damaged") from error
            packed = inflate.unconsumed_tail
        offset += 12 + length
    if missing > 0:
        raise HeaderError("rows are missing")


def _row_bytes(header: Header) -> int:
    """Bytes of all rows, each with its filter type in front."""
    depth, colour, _, _, interlace = header.data[24:29]
    if colour not in PNG_CHANNELS:
        raise HeaderError("unknown colour type")
    bits = depth * PNG_CHANNELS[colour]
    total = 0
    for left, upper, across, down in ADAM7 if interlace else ((0, 0, 1, 1),):
        columns = -(-(header.width - left) // across)
        rows = -(-(header.height - upper) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
