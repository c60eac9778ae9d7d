"""Proves that a file holds all of its image, without keeping a pixel.

Pillow leaves the missing rows of a PNG black, and libjpeg-turbo the missing scans of a JPEG grey.
"""

from __future__ import annotations

import re
import struct

from isal import igzip_lib

from img2img_server.imaging.header import JPEG_END, MAX_JPEG_SCANS, MAX_PARTS, Header, HeaderError

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per pixel by colour type
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
INFLATED_BYTES = 2**18  # bytes that are unpacked at once
# In a scan's data 0xFF is followed by 0x00, a restart marker (0xD0 to 0xD7) or another 0xFF.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_COEFFICIENTS = 64
_MISSING = 0xFF
_MOST_BITS = 13  # the limit of libjpeg


def prove_rows(header: Header) -> None:
    """Unpacks and counts the rows of a PNG, without keeping them.

    Raises:
        HeaderError: rows are missing or damaged.
    """
    assert header.png
    missing = _row_bytes(header)
    # Pillow checks the zlib header (2 bytes) and the checksum.
    unpacker = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE)
    packed = header.png.rows[2:]
    while missing > 0 and not unpacker.eof:
        try:
            rows = unpacker.decompress(packed, INFLATED_BYTES)
        except igzip_lib.IsalError as error:  # type: ignore[misc]  # its stub is wrong
            raise HeaderError("its rows are damaged") from error
        packed = packed[:0]  # Input that the unpacker has not used yet is kept.
        missing -= len(rows)
        if not rows and unpacker.needs_input:
            break
    if missing > 0:
        raise HeaderError("rows are missing")


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


def check_scans(header: Header) -> int:
    """Walks over the scans as the decoder does and returns where the end marker is in header.data.

    header.py adds that marker where the file has none.

    Raises:
        HeaderError: more than MAX_JPEG_SCANS, a component has no scan, a progressive image
            without end marker lacks scans, a scan is cut in its header, or an arithmetic-coded
            image has no end marker, or a marker is reserved.
    """
    frame = header.jpeg
    assert frame
    data, components = header.data, frame.components
    end_of_file = len(data) - len(JPEG_END)  # header.py added the marker
    # The bits that each coefficient of each component still lacks.
    missing = {component: bytearray([_MISSING] * _COEFFICIENTS) for component in components}
    scans, start = 0, frame.first_scan
    for _ in range(MAX_PARTS):
        marker, end = data[start + 1], start + 2
        if 0x01 < marker < 0xC0:
            # Where a restart marker is due, libjpeg searches for the next marker from here on and
            # not behind a segment.
            raise HeaderError("a marker between its scans is invalid")
        if marker not in (0x01, 0xD8, 0xD9):  # All other markers have a length.
            (length,) = struct.unpack_from(">H", data, end)
            end += length
        if marker == 0xD9 or end > end_of_file:
            break
        if marker == 0xDA:
            scans += 1
            if scans > MAX_JPEG_SCANS:
                raise HeaderError(f"it has more than {MAX_JPEG_SCANS} scans")
            scanned = _record(missing, data[start + 4 : end], frame.progressive)
            if scanned == len(components) and not (frame.progressive or frame.arithmetic):
                return data.find(JPEG_END, end)  # Decoders stop after this scan.
        found = _MARKER.search(data, end)
        assert found  # header.data ends with the end marker that header.py added
        start = found.start()
    else:
        raise HeaderError(f"it has more than {MAX_PARTS} segments")
    ended = start < end_of_file and marker == 0xD9
    if any(bits[0] == _MISSING or (not ended and any(bits)) for bits in missing.values()):
        raise HeaderError("scans are missing")
    if not ended and frame.arithmetic:  # Decoders take missing bits for zeros.
        raise HeaderError("its end marker is missing")
    if end > end_of_file and marker != 0xD9:
        raise HeaderError("it is cut off")
    return start


def _record(missing: dict[int, bytearray], scan: bytes, progressive: bool) -> int:
    """Records the bits that a scan holds and returns the number of its components.

    A scan header has the number of components, identifier and tables of each (2 bytes), the first
    and last coefficient, and the bits that were known before and that are still missing (4 bits
    each).
    """
    count = scan[0] if scan else 0
    if count == 0 or len(scan) != 4 + 2 * count:
        raise HeaderError("a scan header is damaged")
    first, last, bits = scan[1 + 2 * count : 4 + 2 * count]
    if max(first, last) >= _COEFFICIENTS or max(bits >> 4, bits & 0xF) > _MOST_BITS:
        raise HeaderError("a scan header is damaged")
    if not progressive:
        first, last, bits = 0, _COEFFICIENTS - 1, 0
    for component in scan[1 : 1 + 2 * count : 2]:
        if component in missing:
            missing[component][first : last + 1] = bytes([bits & 0xF] * (last + 1 - first))
    return count
