"""Reads an image file's header and keeps of the file only what its pixels need.

The decoder never sees metadata: no text, colour profile or EXIF block of a stranger is parsed
beyond what is here, and size and scan count are known before a pixel is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A scan costs a walk over all blocks even when it holds a few bytes, so their number bounds the
# time of a progressive JPEG. Encoders write about ten.
MAX_JPEG_SCANS = 64
# Chunks, segments and fill bytes that are looked at. A PNG of 20 MB in chunks of 4 KiB has 5,000.
MAX_PARTS = 10_000


class HeaderError(Exception):
    """Not a PNG, JPEG or WebP file, or one that breaks its format before the pixels."""


class Container(Enum):
    """Accepted file formats."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What is known before decoding.

    `orientation`: EXIF's 1 to 8, 1 is upright. `data`: the file without what decoding can do
    without; its first frame is the file's.
    """

    container: Container
    width: int
    height: int
    orientation: int
    data: bytes

    @property
    def pixels(self) -> int:
        return self.width * self.height


def read_header(data: bytes) -> Header:
    """Recognises the format by the first bytes and reads the header.

    Raises:
        HeaderError: neither PNG, JPEG nor WebP, truncated, or with impossible values.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            header = _read_png(data)
        elif data.startswith(b"\xff\xd8\xff"):
            header = _read_jpeg(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = _read_webp(data)
        else:
            raise HeaderError("unknown format")
    except (struct.error, IndexError) as error:
        raise HeaderError("truncated") from error
    if not header.pixels:
        raise HeaderError("no pixels")
    return header


def _read_png(data: bytes) -> Header:
    """Chunks: length (4 bytes, big-endian), type (4), content, CRC-32 (4); IHDR first, IEND last.

    Of an animated PNG the default image stays (IDAT); its other frames (fdAT) are dropped.
    """
    kept = [PNG_SIGNATURE]
    orientation, offset = 1, len(PNG_SIGNATURE)
    width = height = 0
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + length
        if end > len(data):
            raise HeaderError("truncated")
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", data, offset + 8)
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[offset + 8 : end - 4])
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[offset:end])
        if kind == b"IEND":
            break
        offset = end
    else:
        raise HeaderError("too many chunks")
    return Header(
        container=Container.PNG,
        width=width,
        height=height,
        orientation=orientation,
        data=b"".join(kept),
    )


def _read_jpeg(data: bytes) -> Header:
    """Segments: 0xFF, marker, length (2 bytes, big-endian, counts itself), content; then scans.

    APP0 (JFIF) and APP14 (Adobe: colour transform) say how to read the pixels; the other
    application segments and comments go.
    """
    kept = [data[:2]]
    header = Header(container=Container.JPEG, width=0, height=0, orientation=1, data=b"")
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xDA:
            scans = data.count(b"\xff\xda", start, _jpeg_end(data, start))
            if scans > MAX_JPEG_SCANS:
                raise HeaderError("too many scans")
            kept.append(data[start:])
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if header.pixels:
                raise HeaderError("two frames")
            height, width = struct.unpack_from(">HH", data, start + 5)
            header = replace(header, width=width, height=height)
        if marker == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0":
            header = replace(header, orientation=_exif_orientation(data[start + 10 : end]))
        if not (0xE1 <= marker <= 0xEF and marker != 0xEE) and marker != 0xFE:
            kept.append(data[start:end])
    return replace(header, data=b"".join(kept))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of each segment up to the first scan (0xDA)."""
    offset = 2
    for _ in range(MAX_PARTS):
        start = data.find(b"\xff", offset)  # decoders skip stray bytes between segments
        if start < 0:
            raise HeaderError("no scan")
        marker = data[start + 1]
        if marker in (0x00, 0xFF):  # a stray byte; a fill byte
            offset = start + 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # stand alone
            offset = start + 2
        elif marker == 0xD9:
            raise HeaderError("no scan")
        else:
            (length,) = struct.unpack_from(">H", data, start + 2)
            offset = start + 2 + length
            if length < 2 or offset > len(data):
                raise HeaderError("truncated")
            yield marker, start, offset
    raise HeaderError("too many segments")


def _jpeg_end(data: bytes, start: int) -> int:
    """End of the first picture in the file; phones append others, with scans of their own."""
    end = data.find(b"\xff\xd9", start)
    return len(data) if end < 0 else end


def _read_webp(data: bytes) -> Header:
    """RIFF chunks: type (4 bytes), length (4, little-endian), content, padded to even length.

    The canvas size is in VP8X when there is one, otherwise in the picture's own chunk.
    """
    size: tuple[int, int] | None = None
    orientation, offset = 1, 12
    for _ in range(MAX_PARTS):
        if offset + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, offset)
        start = offset + 8
        if size is None:
            size = _webp_size(kind, data, start)
        elif kind == b"EXIF":
            exif = data[start : start + length]
            orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
        offset = start + length + length % 2
    else:
        raise HeaderError("too many chunks")
    if size is None:
        raise HeaderError("truncated")
    return Header(
        container=Container.WEBP,
        width=size[0],
        height=size[1],
        orientation=orientation,
        data=data,
    )


def _webp_size(kind: bytes, data: bytes, start: int) -> tuple[int, int]:
    if kind == b"VP8X":  # flags and reserved (4 bytes), width - 1 (3), height - 1 (3)
        width, height = data[start + 4 : start + 7], data[start + 7 : start + 10]
        if len(height) < 3:
            raise HeaderError("truncated")
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if kind == b"VP8L":  # signature (1 byte), then width - 1 and height - 1 in 14 bits each
        (bits,) = struct.unpack_from("<I", data, start + 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":  # frame tag (3 bytes), start code (3), 14 bits each of width and height
        width, height = struct.unpack_from("<HH", data, start + 6)
        return width & 0x3FFF, height & 0x3FFF
    raise HeaderError("not a WebP picture")


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 when it is absent or damaged.

    TIFF: byte order (II or MM), 42, offset of the directory; there a count and entries of 12
    bytes: tag (2), type (2), number (4), value (4).
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
