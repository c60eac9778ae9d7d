"""Reads the bytes of an init image: a file or its content, a file object, or a Pillow image."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

from img2img_client.errors import (
    InitImageFileError,
    InitImageNotFoundError,
    invalid,
    invalid_type,
)
from img2img_client.spec import ImageFile, ImageSource, PillowImage

OTHER_URL = re.compile(r"\s*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# Modes of Pillow that PNG lacks, each with a mode that keeps the image.
PNG_MODES = {
    "CMYK": "RGB",
    "HSV": "RGB",
    "La": "LA",
    "PA": "RGBA",
    "RGBX": "RGB",
    "RGBa": "RGBA",
    "YCbCr": "RGB",
}


def read_bytes(source: ImageSource) -> bytes:
    """Returns the encoded image. A Pillow image becomes a PNG file.

    Raises:
        InvalidArgumentError: the file object or the Pillow image gives no image.
        InvalidArgumentTypeError: the source has the wrong type.
        InitImageFileError: the file cannot be read.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, os.PathLike)):
        return _of_path(source)
    if isinstance(source, PillowImage):
        return _of_pillow(source)
    if isinstance(source, ImageFile):
        return _of_file(source)
    raise invalid_type(
        "init_image", "a path, bytes, a file object, a Pillow image or a URL", source
    )


def _of_path(source: str | os.PathLike[str]) -> bytes:
    path = _path(source)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InitImageNotFoundError(path, error) from error
    except OSError as error:
        raise InitImageFileError(path, error) from error
    except ValueError as error:  # The path contains a NUL.
        text = f"init_image {str(path)!r} is not a path: {error}"
        raise invalid("init_image", "INVALID_FORMAT", text) from error
    if not data:
        raise invalid("init_image", "INVALID_IMAGE", f"the init image {path} is an empty file")
    return data


def _of_file(file: ImageFile) -> bytes:
    try:
        data = file.read()
    except OSError as error:
        name = getattr(file, "name", "")
        path = Path(name if isinstance(name, str) and name else type(file).__name__)
        raise InitImageFileError(path, error) from error
    except ValueError as error:  # The file is closed, or its text cannot be decoded.
        text = f"the file object of init_image cannot be read: {error}"
        raise invalid("init_image", "INVALID_IMAGE", text) from error
    if not isinstance(data, (bytes, bytearray)):
        raise invalid_type("init_image", "a file object opened in binary mode", file)
    if not data:
        text = "the file object of init_image has no bytes left: call seek(0) after writing to it"
        raise invalid("init_image", "INVALID_IMAGE", text)
    return bytes(data)


def _of_pillow(image: PillowImage) -> bytes:
    encoded = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 1}  # The file is sent once and not kept.
    try:
        if exif := image.getexif():
            options["exif"] = exif  # It may say how the image is rotated.
        if (mode := PNG_MODES.get(image.mode)) is not None:
            # The colour profile of a CMYK image does not fit its RGB values.
            options["icc_profile"] = None
            image = image.convert(mode)
        image.save(encoded, format="PNG", **options)
    except (OSError, ValueError, SyntaxError) as error:
        text = f"init_image, a Pillow image of mode {image.mode}, cannot be sent: {error}"
        raise invalid("init_image", "INVALID_IMAGE", text) from error
    return encoded.getvalue()


def _path(source: str | os.PathLike[str]) -> Path:
    if isinstance(source, str) and OTHER_URL.match(source):
        text = (
            f"init_image {source!r} cannot be fetched: a URL must start with http://, https:// or "
            "data:, and a file is given by its path"
        )
        raise invalid("init_image", "INVALID_URL", text)
    if isinstance(source, str) and not source.strip():
        raise invalid("init_image", "REQUIRED", "init_image is empty: give a path or a URL")
    try:
        return Path(source).expanduser()
    except RuntimeError:  # The user in ~user does not exist.
        return Path(source)
