"""Decodes image files to Pillow images and refuses incomplete ones.

Pillow and libjpeg-turbo do the decoding. They report neither missing bits of a JPEG, which this
module finds, nor missing rows of a PNG, which completeness.py finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from img2img_server.imaging.completeness import check_scans
from img2img_server.imaging.header import JPEG_END, Container, Header, HeaderError
from img2img_server.imaging.webp import decode_webp

# The plugins are used and not Image.open, which warns by a global pixel limit.
PLUGINS: dict[Container, type[ImageFile]] = {
    Container.PNG: PngImageFile,
    Container.JPEG: JpegImageFile,
    Container.WEBP: WebPImageFile,
}
# libjpeg-turbo's warnings about missing rows
_MISSING_ROWS = ("premature end of data segment", "found marker 0xd9 instead of RST")
# Bytes that are inserted after the last scan; every Huffman table decodes them differently.
_PADS = (b"\0" * 8, b"\x55" * 8, b"\xaa" * 8, b"\xfe" * 8)
# Each inserted byte costs one more decoding, whose time grows with the pixels of all scans.
MAX_COMPARED_PIXELS = 2**24
_MAX_COMPARED_SCANNED = 2**27
_SCAN = b"\xff\xda"
_RESTARTS = [bytes([0xFF, 0xD0 + number]) for number in range(8)]
# rows of a 16-bit PNG that are read at once
_STRIP_ROWS = 256


def decode(header: Header, smallest: tuple[int, int]) -> Image.Image:
    """Returns the first frame as L, LA, RGB, RGBX, RGBA or CMYK with 8 bits each, without EXIF
    rotation. The fourth channel of RGBX has no meaning.

    Args:
        smallest: A JPEG may be decoded at a half, quarter or eighth, but not below this size.

    Raises:
        HeaderError: The image is damaged or incomplete.
    """
    try:
        image = _decode_jpeg(header, smallest) if header.jpeg else None
        image = image or decode_webp(header) or _decode_with_pillow(header, smallest)
        return _plain(image, header)
    except (MemoryError, HeaderError):
        raise
    except Exception as error:  # Decoders raise a dozen types of errors.
        raise HeaderError("its data is damaged or incomplete") from error


def _decode_with_pillow(header: Header, smallest: tuple[int, int]) -> Image.Image:
    image = PLUGINS[header.container](BytesIO(header.data))
    if image.size != (header.width, header.height):
        raise HeaderError("it states two sizes")
    if not (header.jpeg and header.jpeg.lossless):
        image.draft(None, smallest)
    image.load()
    return image


def _decode_jpeg(header: Header, smallest: tuple[int, int]) -> Image.Image | None:
    """Decodes with libjpeg-turbo's warnings as errors; the pixels equal Pillow's.

    Pillow ignores these warnings, and one of them reports missing rows.

    Returns:
        None where Pillow must decode: CMYK, and files with other warnings.
    """
    assert header.jpeg
    if header.jpeg.lossless:  # simplejpeg writes beyond its buffer when it scales such a JPEG down.
        if not _may_be_whole(header, ""):
            raise HeaderError("rows are missing")
        return None
    space = {1: "GRAY", 3: "RGBX"}.get(len(header.jpeg.components), "CMYK")
    divisor = divisor_of(header, smallest)
    try:
        pixels = simplejpeg.decode_jpeg(
            header.data,
            space,
            min_height=math.ceil(header.height / divisor),
            min_width=math.ceil(header.width / divisor),
            min_factor=divisor,
        )
    except ValueError as error:
        if not _may_be_whole(header, str(error)):
            raise HeaderError("rows are missing") from error
        return None
    if space == "CMYK":
        return None
    if space == "GRAY":
        return Image.fromarray(pixels[..., 0])
    height, width, _ = pixels.shape
    # An image of this mode shares the memory of the array.
    return Image.frombuffer("RGBX", (width, height), pixels.data, "raw", "RGBX", 0, 1)


def divisor_of(header: Header, smallest: tuple[int, int]) -> int:
    """Returns the number by which the sides of an image are divided while it is decoded."""
    if not header.jpeg or header.jpeg.lossless:
        return 1
    room = min(header.width // smallest[0], header.height // smallest[1])
    return next((divisor for divisor in (8, 4, 2) if room >= divisor), 1)


def _may_be_whole(header: Header, warning: str) -> bool:
    """Returns whether a JPEG may hold all rows, given libjpeg-turbo's first warning.

    Bytes after the last row are harmless. Any other warning may hide one about missing rows, so a
    second decoding shows whether missing bits change pixels. Where that is expensive, or where the
    format lets encoders leave out zero bits, the image is whole if it has its end marker.
    """
    assert header.jpeg
    if any(sign in warning for sign in _MISSING_ROWS):
        return False
    if "extraneous bytes before marker 0xd9" in warning:
        return True
    end = check_scans(header)
    scanned = header.pixels * header.data.count(_SCAN, header.jpeg.first_scan, end)
    slow = header.pixels > MAX_COMPARED_PIXELS or scanned > _MAX_COMPARED_SCANNED
    if slow or header.jpeg.arithmetic:
        return end < len(header.data) - len(JPEG_END)
    return _holds_all_bits(header, end)


def _holds_all_bits(header: Header, end: int) -> bool:
    """Returns whether no pixel depends on bytes between the last scan and its end marker.

    Missing bits that change no pixel, as in an image of one colour, are not found.
    """
    size = (header.width, header.height)
    without = _decode_with_pillow(header, size)
    for pad in _PADS:
        padding = b"".join(pad + mark for mark in _RESTARTS)
        padded = replace(header, data=header.data[:end] + padding + header.data[end:])
        if not _are_equal(_decode_with_pillow(padded, size), without):
            return False
    return True


def _are_equal(one: Image.Image, other: Image.Image) -> bool:
    return all(one.crop(box).tobytes() == other.crop(box).tobytes() for box in _strips(one))


def _plain(image: Image.Image, header: Header) -> Image.Image:
    if image.mode == "I;16":
        return _grey8(image)
    if header.colour_key:
        image.putalpha(_key_mask(image, header))
        return image
    if image.mode in ("1", "L") and "transparency" in image.info:
        key, image = image.info["transparency"], image.convert("L")
        image.putalpha(image.point([0 if value == key else 255 for value in range(256)]))
        return image
    if image.has_transparency_data:
        mode = "LA" if image.mode == "LA" else "RGBA"
    else:
        mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
    return image if image.mode == mode else image.convert(mode)


def _grey8(image: Image.Image) -> Image.Image:
    """Returns the upper 8 bits of 16-bit grey, which Pillow would clip."""
    key = image.info.get("transparency")
    grey = np.empty((image.height, image.width), np.uint8)
    mask = None if key is None else np.empty_like(grey)
    for box in _strips(image):
        values = np.asarray(image.crop(box))
        grey[box[1] : box[3]] = values >> 8
        if mask is not None:
            mask[box[1] : box[3]] = np.where(values == key, 0, 255)
    result = Image.fromarray(grey)
    if mask is not None:
        result.putalpha(Image.fromarray(mask))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yields boxes of rows. Work by strips needs little memory besides the image."""
    for top in range(0, image.height, _STRIP_ROWS):
        yield 0, top, image.width, min(top + _STRIP_ROWS, image.height)


def _key_mask(upper: Image.Image, header: Header) -> Image.Image:
    """Returns an alpha channel: 0 where a PNG of 16-bit RGB has the transparent colour.

    Pillow decodes the upper 8 bits, or the lower ones if the other byte order is passed to it.
    """
    lower = PngImageFile(BytesIO(header.data))
    lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
    lower.load()
    key = np.array(header.colour_key)
    mask = np.empty((header.height, header.width), np.uint8)
    for box in _strips(upper):
        is_key = np.asarray(upper.crop(box)) == key >> 8
        is_key &= np.asarray(lower.crop(box)) == key & 0xFF
        mask[box[1] : box[3]] = np.where(is_key.all(-1), 0, 255)
    return Image.fromarray(mask)
