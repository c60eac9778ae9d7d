"""Checks and prepares init images, see docs/http-contract.md#init-image-preparation.

The functions block while they compute and trust no byte of the data. Roles call them in the
processes of pool.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from img2img_server.domain.params import ImageFormat, Limits
from img2img_server.domain.violations import Reason, Violation
from img2img_server.imaging.base import (
    CheckedImage,
    InvalidImageError,
    Pixels,
    not_an_image,
    too_large,
)
from img2img_server.imaging.colour import apply_transform, srgb_transform
from img2img_server.imaging.completeness import check_scans, prove_rows
from img2img_server.imaging.cost import Admit, admit_all, cost_of, may_be_transparent
from img2img_server.imaging.decode import decode, divisor_of
from img2img_server.imaging.encode import encode_image
from img2img_server.imaging.formats import PLAIN_TEXT, format_name
from img2img_server.imaging.header import Container, Header, HeaderError, container_of, read_header
from img2img_server.imaging.metadata import read_metadata

# An init image up to these limits is queued as the caller's own file. A larger one is encoded
# again: that costs less than its transport in the queue or its decoding in the worker.
OWN_MAX_BYTES = 512 * 2**10
OWN_MAX_PIXELS = 2**22
# A JPEG may be decoded at a half, quarter or eighth if that leaves this many times the requested
# pixels along each side: the resized image then looks like one of the full size.
DECODE_GAP = 3.0
# The box of an image with more pixels is averaged before its colours are converted to sRGB, which
# takes 0.1 s for 4 megapixels. At least CONVERT_GAP times the requested pixels along each side are
# left: edges between saturated colours differ by a few of 255.
CONVERT_MAX_PIXELS = 2**22
CONVERT_GAP = 2.0
STRIP_ROWS = 256  # rows whose colours are converted at once

# The last transformation for each EXIF orientation. From 5 on, rows and columns are swapped before.
FLIPS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    6: Image.Transpose.FLIP_LEFT_RIGHT,
    7: Image.Transpose.ROTATE_180,
    8: Image.Transpose.FLIP_TOP_BOTTOM,
}
# A function from the size of the image to the requested size. Roles send it to another process, so
# it must be a function of a module, or a functools.partial of one.
Fit = Callable[[tuple[int, int]], tuple[int, int]]
Box = tuple[float, float, float, float]  # left, upper, right, lower


def check_image(
    data: bytes,
    *,
    width: int,
    height: int,
    limits: Limits,
    downloaded: bool = False,
    fit: Fit | None = None,
    admit: Admit = admit_all,
) -> CheckedImage:
    """Proves that an init image decodes completely within the limits.

    Small files are returned unchanged, others are prepared at width x height as JPEG.

    Args:
        downloaded: Whether the data comes from a URL of the caller, for the error message.
        fit: Returns the requested width and height for the size of the upright image; replaces
            `width` and `height`.
        admit: Is called once, before any pixel is decoded.

    Raises:
        InvalidImageError: The image is too large, has too many pixels, is damaged, incomplete or of
            another format.
    """
    if len(data) > limits.max_image_bytes:
        raise too_large(limits)
    header = _header(data, "the URL served" if downloaded else "the data is")
    if header.pixels > limits.max_image_pixels:
        raise _too_many_pixels(header, limits)
    own_size = _upright_size(header)
    if fit:
        width, height = fit(own_size)
    plan = _planned(header, width, height)
    is_kept = len(data) <= OWN_MAX_BYTES and header.pixels <= OWN_MAX_PIXELS
    admit(cost_of(header, len(data), plan.divisor, 0 if is_kept else plan.copied_pixels))
    try:
        if header.png:
            prove_rows(header)
        if header.jpeg:
            check_scans(header)
    except HeaderError as error:
        raise _invalid(header.container, error) from error
    if is_kept:
        # The smallest scale skips the inverse transform but still reads every coefficient.
        _decode(header, smallest=(1, 1))
    else:
        data = encode_image(_prepare(header, plan), ImageFormat.JPEG)
    return CheckedImage(
        data=data, prepared=not is_kept, width=width, height=height, own_size=own_size
    )


def _upright_size(header: Header) -> tuple[int, int]:
    turned, _ = read_metadata(header)
    return (header.height, header.width) if turned >= 5 else (header.width, header.height)


def prepare_image(
    data: bytes, *, width: int, height: int, prepared: bool = False, admit: Admit = admit_all
) -> Pixels:
    """Prepares an init image as height x width x 3 pixels; deterministic.

    EXIF rotation, first frame, colours to sRGB, transparency on white, 8-bit RGB, the largest
    centred box of the target's aspect ratio, one Lanczos resize.

    Args:
        data: An image that check_image has accepted; limits are not checked again.
        prepared: The image must have the requested size already.
        admit: Is called once, before any pixel is decoded.

    Raises:
        InvalidImageError: The image is damaged, or was prepared at another size.
    """
    header = _header(data)
    if prepared and (header.width, header.height) != (width, height):
        raise not_an_image("it was prepared at another size")
    plan = _planned(header, width, height)
    admit(cost_of(header, len(data), plan.divisor, plan.copied_pixels))
    return _prepare(header, plan)


def _header(data: bytes, source: str = "the data is") -> Header:
    container = container_of(data)
    if container is None:
        name = format_name(data)
        advice = "send a PNG, JPEG or WebP image"
        # The caller may have sent a URL without a scheme, or a path.
        if name == PLAIN_TEXT and b"\n" not in data:
            advice += ", or its URL with http:// or https://"
        raise not_an_image(f"{source} {name}; {advice}")
    try:
        return read_header(data)
    except HeaderError as error:
        raise _invalid(container, error) from error


def _invalid(container: Container, error: HeaderError) -> InvalidImageError:
    return not_an_image(f"the {container.title} image cannot be used: {error}")


def _too_many_pixels(header: Header, limits: Limits) -> InvalidImageError:
    most = f"{limits.max_image_pixels / 1_000_000:g}"
    size = f"{header.width}x{header.height} pixels, {header.pixels / 1e6:.1f} megapixels"
    message = f"init_image must not have more than {most} megapixels"
    cause, values = f"the image has {size}", {"max_megapixels": most}
    return InvalidImageError(
        Violation("init_image", Reason.TOO_MANY_PIXELS, message, cause, values)
    )


class _Plan(NamedTuple):
    """How an image is prepared.

    Attributes:
        turned: The EXIF orientation.
        width, height: The requested size, before the rotation.
        box: The part of the image that is used.
        smallest: The least size at which a JPEG may be decoded.
        divisor: The number by which the sides are divided while it is decoded.
        copied_pixels: The pixels of a second image, which exists besides the decoded one.
    """

    turned: int
    profile: bytes
    width: int
    height: int
    box: Box
    smallest: tuple[int, int]
    divisor: int
    copied_pixels: int


def _planned(header: Header, width: int, height: int) -> _Plan:
    turned, profile = read_metadata(header)
    if turned >= 5:  # The target is rotated by 90 degrees, so the box is, too.
        width, height = height, width
    box = _centred_box((header.width, header.height), width / height)
    gap = DECODE_GAP * width / (box[2] - box[0])
    smallest = (int(header.width * gap) + 1, int(header.height * gap) + 1)
    divisor = divisor_of(header, smallest)
    decoded = header.pixels // divisor**2
    copied = int(width * (box[3] - box[1]) / divisor)  # The resize works on the columns first.
    is_cmyk = header.jpeg and len(header.jpeg.components) > 3
    if profile or is_cmyk or may_be_transparent(header):
        cut = (box[2] - box[0]) * (box[3] - box[1]) / divisor**2
        factor = _factor(box, width * divisor) if decoded > CONVERT_MAX_PIXELS else 1
        copied = max(copied, int(cut / factor**2))
    if turned >= 5:
        copied = max(copied, decoded)
    return _Plan(turned, profile, width, height, box, smallest, divisor, copied)


def _prepare(header: Header, plan: _Plan) -> Pixels:
    turned, profile, width, height, box, smallest, *_ = plan
    image = _decode(header, smallest)
    if image.size != (header.width, header.height):
        box = _scaled(box, round(header.width / image.width), image.size)
    transform = srgb_transform(profile, _colours(image))
    is_simple = transform is None and image.mode in ("L", "RGB", "RGBX")
    if not is_simple and image.width * image.height > CONVERT_MAX_PIXELS:
        image, box = _averaged(image, box, width)
    image = _opaque_srgb(image, transform)
    # The image is rotated before the resize, whose two passes do not commute exactly.
    if turned >= 5:
        image, box = image.transpose(Image.Transpose.TRANSPOSE), (*box[1::-1], *box[:1:-1])
        width, height = height, width
    if image.size != (width, height) or box != (0, 0, width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, box)
    if turned in FLIPS:
        image = image.transpose(FLIPS[turned])
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _decode(header: Header, smallest: tuple[int, int]) -> Image.Image:
    try:
        return decode(header, smallest)
    except HeaderError as error:
        raise _invalid(header.container, error) from error


def _centred_box(size: tuple[int, int], aspect: float) -> Box:
    """Returns the largest centred box with width / height = aspect. Its edges may cut pixels."""
    width, height = size
    box_width = min(width, height * aspect)
    box_height = min(height, width / aspect)
    left, upper = (width - box_width) / 2, (height - box_height) / 2
    return left, upper, left + box_width, upper + box_height


def _scaled(box: Box, divisor: int, size: tuple[int, int]) -> Box:
    left, upper, right, lower = (edge / divisor for edge in box)
    return left, upper, min(right, size[0]), min(lower, size[1])


def _averaged(image: Image.Image, box: Box, width: int) -> tuple[Image.Image, Box]:
    """Cuts the box out and averages squares of its pixels. Returns the image and the new box.

    It works by strips of rows, so it needs little memory besides the two images. Transparent pixels
    have no part in the average colour.
    """
    left, upper, right, lower = box
    factor = _factor(box, width)
    cut = (int(left), int(upper), math.ceil(right), math.ceil(lower))
    size = (-(-(cut[2] - cut[0]) // factor), -(-(cut[3] - cut[1]) // factor))
    reduced = Image.new(image.mode, size)
    weighted = {"LA": "La", "RGBA": "RGBa"}.get(image.mode)
    for row in range(0, size[1], STRIP_ROWS):
        top = cut[1] + row * factor
        bottom = min(cut[1] + (row + STRIP_ROWS) * factor, cut[3])
        strip = image.crop((cut[0], top, cut[2], bottom))
        if weighted:
            strip = strip.convert(weighted).reduce(factor).convert(image.mode)
        else:
            strip = strip.reduce(factor)
        reduced.paste(strip, (0, row))
    image = reduced
    moved = (left - cut[0], upper - cut[1], right - cut[0], lower - cut[1])
    return image, _scaled(moved, factor, image.size)


def _factor(box: Box, width: int) -> int:
    """Returns the side of the squares whose pixels are averaged."""
    return max(1, int((box[2] - box[0]) / (width * CONVERT_GAP)))


def _colours(image: Image.Image) -> str:
    """Returns the mode of an image without its alpha channel: L, RGB or CMYK."""
    return image.mode.removesuffix("A").removesuffix("X")


def _opaque_srgb(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    """Returns grey, RGB or RGBX: converts the colours, then puts transparent parts on white."""
    if transform is None and image.mode in ("L", "RGB", "RGBX"):
        return image
    is_grey = transform is None and _colours(image) == "L"
    opaque = Image.new("L" if is_grey else "RGB", image.size)
    for row in range(0, image.height, STRIP_ROWS):
        strip = image.crop((0, row, image.width, min(row + STRIP_ROWS, image.height)))
        opaque.paste(_opaque_strip(strip, transform), (0, row))
    return opaque


def _opaque_strip(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image if image.mode == "CMYK" else image.convert(_colours(image))
    if transform:
        colours = apply_transform(colours, transform)
    elif colours.mode == "CMYK":
        colours = colours.convert("RGB")
    if alpha is None:
        return colours
    white = Image.new(colours.mode, colours.size, "white")
    white.paste(colours, mask=alpha)
    return white
