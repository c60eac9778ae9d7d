"""Checks init images and prepares them as section 5 of the HTTP contract says.

Everything here computes and blocks: call it in a thread. Pillow releases the GIL while it decodes,
resizes and encodes.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from img2img_server.domain.params import ImageFormat, Limits
from img2img_server.images.base import CheckedImage, InvalidImageError, Pixels, too_large
from img2img_server.images.encode import encode_image
from img2img_server.images.header import Container, Header, HeaderError, read_header
from img2img_server.images.png_rows import prove_rows

# Up to here the caller's own bytes travel through the queue. Beyond, they cost the queue or the
# worker (a small file may hold many pixels) more than encoding them once more.
OWN_MAX_BYTES = 512 * 2**10
OWN_MAX_PIXELS = 2**22
# Beyond this, one picture at a time: decoding takes up to 16 bytes a pixel (WebP; others 4 to 9).
LARGE_PIXELS = 2**24
ONE_LARGE = threading.Lock()
# A JPEG may be decoded at a half, quarter or eighth when that leaves this many times the pixels
# asked for along each side: Lanczos then cannot be told from one on the full picture.
DECODE_GAP = 3.0

# The plugins themselves, not Image.open: that one also warns by a global pixel limit.
PLUGINS: dict[Container, type[ImageFile]] = {
    Container.PNG: PngImageFile,
    Container.JPEG: JpegImageFile,
    Container.WEBP: WebPImageFile,
}
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Box = tuple[float, float, float, float]  # left, upper, right, lower


def check_image(data: bytes, *, width: int, height: int, limits: Limits) -> CheckedImage:
    """Proves that an init image decodes completely within the limits.

    Small pictures come back as they are, others prepared at width x height as JPEG.

    Raises:
        InvalidImageError: it is too large, has too many pixels, is damaged or no image.
    """
    if len(data) > limits.max_image_bytes:
        raise too_large(limits)
    header = _header(data)
    if header.pixels > limits.max_image_pixels:
        most = limits.max_image_pixels / 1_000_000
        raise InvalidImageError(f"init_image must not have more than {most:g} megapixels")
    if header.container is Container.PNG:
        try:
            prove_rows(header)
        except HeaderError as error:
            raise _invalid() from error
    if len(data) <= OWN_MAX_BYTES and header.pixels <= OWN_MAX_PIXELS:
        # The smallest scale skips the inverse transform, not the reading of every coefficient.
        _decode(header, smallest=(1, 1))
        return CheckedImage(data=data, prepared=False)
    pixels = _prepare(header, width, height)
    return CheckedImage(data=encode_image(pixels, ImageFormat.JPEG), prepared=True)


def is_cheap(data: bytes) -> bool:
    """Whether check_image takes a few milliseconds at the most, going by size and header."""
    try:
        return len(data) <= OWN_MAX_BYTES and read_header(data).pixels <= OWN_MAX_PIXELS
    except HeaderError:
        return True


def prepare_image(data: bytes, *, width: int, height: int, prepared: bool = False) -> Pixels:
    """Makes exactly height x width x 3 pixels of an init image: the same ones each time.

    EXIF rotation, first frame, transparency on white, 8-bit RGB, the largest centred box of the
    target's aspect ratio, one Lanczos resize.

    Args:
        data: a picture that check_image let through; its limits are not checked again.
        prepared: it must have the size already.

    Raises:
        InvalidImageError: it is damaged, or not of the size although prepared.
    """
    header = _header(data)
    if prepared and (header.width, header.height) != (width, height):
        raise _invalid()
    return _prepare(header, width, height)


def _invalid() -> InvalidImageError:
    return InvalidImageError("init_image is not a valid PNG, JPG or WebP image")


def _header(data: bytes) -> Header:
    try:
        return read_header(data)
    except HeaderError as error:
        raise _invalid() from error


def _prepare(header: Header, width: int, height: int) -> Pixels:
    if header.orientation >= 5:  # lies on its side: so does the box that is cut
        width, height = height, width
    box = _centred_box((header.width, header.height), width / height)
    gap = DECODE_GAP * width / (box[2] - box[0])
    smallest = (int(header.width * gap) + 1, int(header.height * gap) + 1)
    with _turn(header):
        image = _decode(header, smallest)
        if image.size != (header.width, header.height):
            box = _scaled(box, round(header.width / image.width), image.size)
        if image.size != (width, height) or box != (0, 0, width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS, box)
    if header.orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[header.orientation])
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _turn(header: Header) -> AbstractContextManager[object]:
    return ONE_LARGE if header.pixels > LARGE_PIXELS else nullcontext()


def _centred_box(size: tuple[int, int], aspect: float) -> Box:
    """The largest centred box with width / height = aspect; its edges may cut pixels."""
    width, height = size
    box_width = min(width, height * aspect)
    box_height = min(height, width / aspect)
    left, upper = (width - box_width) / 2, (height - box_height) / 2
    return left, upper, left + box_width, upper + box_height


def _scaled(box: Box, divisor: int, size: tuple[int, int]) -> Box:
    left, upper, right, lower = (edge / divisor for edge in box)
    return left, upper, min(right, size[0]), min(lower, size[1])


def _decode(header: Header, smallest: tuple[int, int]) -> Image.Image:
    """The first frame in opaque 8-bit RGB or grey; a JPEG perhaps smaller, not below smallest."""
    try:
        image = PLUGINS[header.container](BytesIO(header.data))
        agrees = image.size == (header.width, header.height)
        if agrees:
            image.draft(None, smallest)
            image.load()
            opaque = _opaque(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise _invalid() from error
    if not agrees:
        raise _invalid()
    return opaque


def _opaque(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB or grey with transparent parts on white."""
    if image.mode == "I;16":
        return _grey8(image)
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(layer, mask=layer)
        return white
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _grey8(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow would clip; a tRNS chunk may name one value as transparent."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)
