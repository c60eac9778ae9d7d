"""Creates init images that are expensive for their size, and ordinary ones."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

from img2img_server.imaging.completeness import ADAM7


@functools.cache
def plain(side: int, container: str) -> bytes:
    """Returns an image of one colour: few bytes, many pixels."""
    return _saved(Image.new("RGB", (side, side), (200, 100, 50)), container)


@functools.cache
def noise(side: int, container: str = "JPEG", *, quality: int = 90) -> bytes:
    """Returns an image that does not compress: many bytes for its pixels."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    options = {"method": 0} if container == "WEBP" else {}
    return _saved(Image.fromarray(pixels), container, quality=quality, **options)


@functools.cache
def textured(side: int, container: str, *, lossless: bool = False) -> bytes:
    """Returns an image with a pattern at every scale, like an ordinary photo."""
    tile = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rough = Image.fromarray(tile).resize((side, side), Image.Resampling.BILINEAR)
    options: dict[str, object] = {"quality": 90}
    if container == "WEBP":
        options |= {"method": 0, "lossless": lossless}
    if container == "PNG":
        options = {"compress_level": 1}
    return _saved(rough, container, **options)


def _saved(image: Image.Image, container: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, container, **options)
    return buffer.getvalue()


def jpeg_of_scans(scans: int, side: int, *, hidden: bool = True) -> bytes:
    """Returns a progressive JPEG with this many scans. Each costs a walk over all blocks.

    Args:
        hidden: A comment after the first scan contains the end marker, as if the file ended there.
    """
    frame = struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])
    blocks = (-(-side // 8)) ** 2
    # The first scan has a bit for every block: difference 0. The others refine no coefficient: runs
    # of blocks without one (EOB runs of 32,767 blocks).
    first = bytes(-(-blocks // 8))
    table = _segment(0xC4, bytes([0x00]) + bytes([1] + [0] * 15) + b"\0")
    runs = _segment(0xC4, bytes([0x10]) + bytes([1] + [0] * 15) + bytes([0xE0]))
    dc_scan = _segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0]))
    ac_scan = _segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0]))
    parts = [b"\xff\xd8", _segment(0xDB, b"\0" + b"\1" * 64), _segment(0xC2, frame), table]
    parts += [dc_scan, first]
    if hidden:
        parts.append(_segment(0xFE, b"\xff\xd9"))
    parts.append(runs)
    # A code bit 0 and 14 bits of run length, all ones: 32,767 blocks at most a code.
    codes = -(-blocks // 16_384)
    bits = "".join("0" + "0" * 14 for _ in range(codes))  # runs of 16,384 blocks
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    parts += [ac_scan + body] * (scans - 1)
    return b"".join((*parts, b"\xff\xd9"))


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def webp_of_one_colour(side: int) -> bytes:
    """Returns a lossless WebP of some 34 bytes: every pixel has the same colour."""
    return _saved(Image.new("RGB", (side, side), (1, 2, 3)), "WEBP", lossless=True, quality=0)


def png_with_bomb_chunk(side: int, size: int) -> bytes:
    """Returns a PNG whose compressed text chunk inflates to `size` bytes of zeros."""
    image = plain(side, "PNG")
    text = b"Comment\0\0" + zlib.compress(bytes(size), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    return image[:33] + chunk + image[33:]


def png_interlaced(side: int) -> bytes:
    """Returns an interlaced PNG of one colour and 16 bits a sample, the slowest kind to decode."""
    rows = bytearray()
    for x, y, dx, dy in ADAM7:
        width, height = -(-(side - x) // dx), -(-(side - y) // dy)
        if width > 0 and height > 0:
            rows += (b"\4" + bytes(width * 6)) * height  # Paeth filter, RGB of 16 bits
    head = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 1)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(rows), 1)), (b"IEND", b"")]
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in parts:
        out += struct.pack(">I", len(content)) + kind + content
        out += struct.pack(">I", zlib.crc32(kind + content))
    return out
