"""Bounds the scans of a JPEG and finds missing ones; both need no decoding."""

from __future__ import annotations

import re
import struct

from img2img_server.imaging.header import JPEG_END, MAX_JPEG_SCANS, MAX_PARTS, Header, HeaderError

# In a scan's data 0xFF is followed by 0x00, a restart marker (0xD0 to 0xD7) or another 0xFF.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_COEFFICIENTS = 64
_MISSING = 0xFF
_MOST_BITS = 13  # as libjpeg has it


def check_scans(header: Header) -> int:
    """Walks over the scans as the decoder does and returns where the end marker is in header.data.

    That is the one which header.py added where the file has none.

    Raises:
        HeaderError: more than MAX_JPEG_SCANS, a component has no scan, a progressive image
            without end marker lacks scans, a scan is cut in its header, or an arithmetic-coded
            image has no end marker.
    """
    frame = header.jpeg
    assert frame
    data, components = header.data, frame.components
    end_of_file = len(data) - len(JPEG_END)  # header.py added the marker
    # For each component the bits that each coefficient still lacks.
    missing = {component: bytearray([_MISSING] * _COEFFICIENTS) for component in components}
    scans, start = 0, frame.first_scan
    for _ in range(MAX_PARTS):
        marker, end = data[start + 1], start + 2
        if marker not in (0x01, 0xD8, 0xD9):  # the others have a length
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
                return data.find(JPEG_END, end)  # decoders stop after this scan
        found = _MARKER.search(data, end)
        assert found  # the end marker that was added
        start = found.start()
    else:
        raise HeaderError(f"it has more than {MAX_PARTS} segments")
    ended = start < end_of_file and marker == 0xD9
    if any(bits[0] == _MISSING or (not ended and any(bits)) for bits in missing.values()):
        raise HeaderError("scans are missing")
    if not ended and frame.arithmetic:  # no decoder tells its missing bits from zeros
        raise HeaderError("its end marker is missing")
    if end > end_of_file and marker != 0xD9:
        raise HeaderError("it is cut off")
    return start


def _record(missing: dict[int, bytearray], scan: bytes, progressive: bool) -> int:
    """Notes what a scan brings and returns the number of its components.

    A scan header: number of components, identifier and tables of each (2 bytes), first and last
    coefficient, bits that were known before and are still missing (4 bits each).
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
