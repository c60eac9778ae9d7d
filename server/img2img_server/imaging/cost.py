"""The memory and the CPU time that an image file may use, by its header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from img2img_server.imaging.decode import MAX_COMPARED_PIXELS
from img2img_server.imaging.header import Container, Header
from img2img_server.imaging.webp import is_decoded_here

# The CPU time of one file, in units of the setting decode_cpu_seconds. The slowest ordinary files,
# CMYK JPEGs of many scans, take a third of it on a slow core. Files that were made to be slow take
# more: then the kernel ends the process that decodes them.
CPU_UNITS: Final = 1.0
CPU_UNITS_PER_MEGAPIXEL: Final = 0.2
# Copies of the file while its parts are joined and decoded.
_FILE_COPIES: Final = 4
# Everything that does not grow with the image: codec tables, strips of rows, the result.
_FIXED_BYTES: Final = 16 * 2**20

_WEBP_ALPHA: Final = 0x10  # flag of the extended header
_TABLE_BYTES: Final = 2048  # The header of a PNG and its palettes are shorter.


class Cost(NamedTuple):
    """The most that one image file may use while it is checked or prepared.

    Attributes:
        memory_bytes: Besides what an idle process uses.
        cpu_units: CPU time of all threads together, in units of the setting decode_cpu_seconds.
    """

    memory_bytes: int
    cpu_units: float


# Waits until there is memory for an image. Raises InvalidImageError if there never is.
Admit = Callable[[Cost], None]


def admit_all(_: Cost) -> None:
    """Admits any image."""


def cost_of(header: Header, file_bytes: int, divisor: int, copied_pixels: int) -> Cost:
    """Returns the cost of an image file.

    Args:
        file_bytes: The length of the file, which `header` has without metadata.
        divisor: The number by which its sides are divided while it is decoded.
        copied_pixels: The pixels of a second image that exists besides the decoded one.
    """
    memory = header.pixels * _bytes_per_pixel(header, divisor) + copied_pixels * 4
    memory += file_bytes * _FILE_COPIES + _FIXED_BYTES
    return Cost(int(memory), CPU_UNITS + CPU_UNITS_PER_MEGAPIXEL * header.pixels / 1e6)


def may_be_transparent(header: Header) -> bool:
    """Returns whether an image may have an alpha channel or a transparent colour."""
    match header.container:
        case Container.PNG:
            assert header.png
            return header.png.colour in (4, 6) or b"tRNS" in header.data[:_TABLE_BYTES]
        case Container.WEBP:
            first, second = _webp_chunks(header)
            has_flag = first == b"VP8X" and header.data[20] & _WEBP_ALPHA
            return bool(has_flag) or second != b"VP8 "
        case Container.JPEG:
            return False


def _webp_chunks(header: Header) -> tuple[bytes, bytes]:
    """Returns the kind of the first chunk, and of the second one after an extended header."""
    first = header.data[12:16]
    return first, header.data[30:34] if first == b"VP8X" else first


def _bytes_per_pixel(header: Header, divisor: int) -> float:
    """Returns the bytes that decoding needs for a pixel of the file.

    A decoded pixel has 4 bytes, a grey one less. tests/integration/test_decoder_memory.py compares
    the sums with the memory of a process.
    """
    match header.container:
        case Container.WEBP if not is_decoded_here(header):
            return 17
        case Container.WEBP:  # A lossless one has a buffer of the decoder.
            return 8 if b"VP8L" in _webp_chunks(header) else 5.5
        case Container.PNG:
            return _png_bytes_per_pixel(header)
        case Container.JPEG:
            return _jpeg_bytes_per_pixel(header, divisor)


def _png_bytes_per_pixel(header: Header) -> float:
    assert header.png
    if header.colour_key:  # It is decoded twice.
        return 9
    if header.png.colour == 0 and may_be_transparent(header):
        return 8  # Grey of 16 bits, grey of 8 bits, the mask, and 4 bytes for grey with alpha.
    return 3 if header.png.colour == 0 else 5


def _jpeg_bytes_per_pixel(header: Header, divisor: int) -> float:
    assert header.jpeg
    components = len(header.jpeg.components)
    decoded = 4 / divisor**2 * (2 if components > 3 else 1)  # CMYK is converted to RGB.
    if header.pixels <= MAX_COMPARED_PIXELS:  # Two decoded images may be compared.
        decoded = 8
    # Several scans need a buffer of the coefficients, 2 bytes each.
    in_one_scan = header.data[header.jpeg.first_scan + 4 :][:1] == bytes([components])
    is_buffered = header.jpeg.progressive or not in_one_scan
    return decoded + (2 * header.jpeg.samples if is_buffered else 0)
