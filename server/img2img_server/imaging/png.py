"""Writes PNG files seven times faster than Pillow, see docs/adr/0002-png-encoding.md."""

from __future__ import annotations

import struct

import numpy as np
from isal import isal_zlib

from img2img_server.imaging.base import Pixels

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB8 = (8, 2, 0, 0, 0)  # bit depth, colour type, compression, filter set, no interlace
AVERAGE = 3
# Rows that are filtered together. Their temporary arrays must fit the processor's cache.
STRIP_ROWS = 32


def write_png(pixels: Pixels) -> bytes:
    """Returns an 8-bit RGB file without metadata, that decodes to exactly these pixels.

    The same pixels give the same bytes on the same kind of processor; another kind may compress
    differently.

    Args:
        pixels: height x width x 3.
    """
    height, width, channels = pixels.shape
    assert channels == 3
    return b"".join(
        (
            PNG_SIGNATURE,
            png_chunk(b"IHDR", struct.pack(">II5B", width, height, *RGB8)),
            png_chunk(b"IDAT", isal_zlib.compress(_filtered(pixels), 1)),
            png_chunk(b"IEND", b""),
        )
    )


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk: length, type, content and CRC-32."""
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)))


def _filtered(pixels: Pixels) -> Pixels:
    """Returns each row as its filter type and x - floor((left + above) / 2), modulo 256.

    Filter Average of the PNG specification, section 9.2; outside the image all values are 0.
    """
    height, width = pixels.shape[:2]
    padded = np.zeros((height + 1, (width + 1) * 3), np.uint8)
    padded[1:, 3:] = pixels.reshape(height, width * 3)
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = AVERAGE
    for start in range(0, height, STRIP_ROWS):
        end = min(start + STRIP_ROWS, height)
        above = padded[start:end, 3:]
        left = padded[start + 1 : end + 1, :-3]
        # floor((a + b) / 2) without a ninth bit
        mean = np.bitwise_xor(above, left)
        mean >>= 1
        mean += above & left
        np.subtract(padded[start + 1 : end + 1, 3:], mean, out=rows[start:end, 1:])
    return rows
