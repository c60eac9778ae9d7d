"""Decodes still WebP images with the library that Pillow brings, in half of Pillow's memory.

Pillow decodes every WebP as an animation, which takes up to 17 bytes a pixel: two canvases, the
decoder's own buffer, a copy as bytes and the image.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, _webp

from img2img_server.imaging.header import Container, Header, HeaderError

_ABI_VERSION = 0x0200  # of the decoder; only the upper byte is compared
_ANIMATION = 0x02  # flag of the extended header


class _Features(ctypes.Structure):
    """WebPBitstreamFeatures of libwebp."""

    _fields_ = (
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("has_alpha", ctypes.c_int),
        ("has_animation", ctypes.c_int),
        ("format", ctypes.c_int),
        ("padding", ctypes.c_uint32 * 5),
    )


def decode_webp(header: Header) -> Image.Image | None:
    """Returns a still WebP image as RGBA or RGBX; the pixels equal Pillow's.

    Returns:
        None where Pillow must decode, see is_decoded_here.

    Raises:
        HeaderError: The image is damaged or incomplete.
    """
    if not is_decoded_here(header):
        return None
    library, features = _library(), _Features()
    status = library.WebPGetFeaturesInternal(
        header.data, len(header.data), ctypes.byref(features), _ABI_VERSION
    )
    if status or (features.width, features.height) != (header.width, header.height):
        raise HeaderError("its data is damaged or incomplete")
    pixels = np.empty((header.height, header.width, 4), np.uint8)
    if not library.WebPDecodeRGBAInto(
        header.data, len(header.data), pixels.ctypes.data, pixels.nbytes, header.width * 4
    ):
        raise HeaderError("its data is damaged or incomplete")
    mode = "RGBA" if features.has_alpha else "RGBX"
    return Image.frombuffer(mode, (header.width, header.height), pixels, "raw", mode, 0, 1)


def is_decoded_here(header: Header) -> bool:
    """Returns whether decode_webp decodes the image: a still WebP, with a libwebp that is found."""
    if header.container is not Container.WEBP or not _library():
        return False
    data = header.data
    extended = data[12:16] == b"VP8X"
    return not extended or not (data[20] & _ANIMATION or data[30:34] in (b"ANIM", b"ANMF"))


@cache
def _library() -> Any:
    """Returns libwebp, or None where Pillow's module does not lead to it."""
    try:
        library = ctypes.CDLL(_webp.__file__)
        features, decode = library.WebPGetFeaturesInternal, library.WebPDecodeRGBAInto
    except (OSError, AttributeError):
        return None
    data: list[Any] = [ctypes.c_char_p, ctypes.c_size_t]
    features.argtypes = [*data, ctypes.c_void_p, ctypes.c_int]
    features.restype = ctypes.c_int
    decode.argtypes = [*data, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    decode.restype = ctypes.c_void_p
    return library
