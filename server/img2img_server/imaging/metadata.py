"""Reads orientation and colour profile from the metadata of an image.

Pillow parses the metadata without the pixels; metadata that Pillow cannot read counts as absent.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any, NamedTuple

import structlog
from PIL import Image
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngStream

from img2img_server.imaging.header import Container, Header, Part

log = structlog.get_logger(__name__)

# Only the beginning of a longer EXIF block is read: Pillow copies the target of each entry, so its
# time grows with the square of the length. Cameras write the orientation into the first hundred
# bytes.
MAX_EXIF_BYTES = 2**17
MAX_PROFILE_BYTES = 2**22  # profiles of printers have up to 3 MB
# ImageMagick stores EXIF in a PNG under this keyword, as hexadecimal text.
_RAW_EXIF = "Raw profile type exif"

# Pillow warns when it skips a damaged EXIF entry.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class Metadata(NamedTuple):
    """The facts that are read from the metadata.

    Attributes:
        orientation: EXIF's value, 1 (upright) to 8, from any block in which Pillow finds it.
        icc_profile: Empty when there is none or it is too large.
    """

    orientation: int
    icc_profile: bytes


def read_metadata(header: Header) -> Metadata:
    """Reads the metadata; damaged parts count as absent."""
    info = _info(header)
    profile = info.get("icc_profile") or b""
    if len(profile) > MAX_PROFILE_BYTES:
        log.info("icc_profile_ignored", reason="it is too large", bytes=len(profile))
        profile = b""
    return Metadata(_orientation(info), profile)


def _orientation(info: dict[str | tuple[int, int], Any]) -> int:
    carrier = Image.Image()
    carrier.info = info
    try:
        found = carrier.getexif().get(Base.Orientation, 1)
        return next((value for value in range(2, 9) if value == found), 1)
    except Exception as error:  # Pillow raises a dozen types of errors.
        log.debug("image_metadata_ignored", part="EXIF", reason=str(error))
        return 1


def _info(header: Header) -> dict[str | tuple[int, int], Any]:
    """Returns the metadata under the names that Pillow's plugins give it."""
    match header.container:
        case Container.PNG:
            info = _png_info(header.metadata)
        case Container.JPEG:
            info = _jpeg_info(header.metadata)
        case Container.WEBP:
            names = {b"EXIF": "exif", b"XMP ": "xmp", b"ICCP": "icc_profile"}
            info = {names[kind]: content for kind, content in reversed(header.metadata)}
    if "exif" in info:
        info["exif"] = info["exif"][:MAX_EXIF_BYTES]
    return info


def _png_info(metadata: tuple[Part, ...]) -> dict[str | tuple[int, int], Any]:
    info: dict[str | tuple[int, int], Any] = {}
    for kind, content in metadata:
        stream = PngStream(BytesIO(content))
        try:
            stream.call(kind, 0, len(content))
        except Exception as error:
            log.debug("image_metadata_ignored", part=kind.decode(), reason=str(error))
            continue
        info |= stream.im_info
    if _RAW_EXIF in info and "exif" not in info:
        digits = "".join(info[_RAW_EXIF].split("\n")[3:])
        try:
            info["exif"] = bytes.fromhex(digits)
        except ValueError:
            del info[_RAW_EXIF]
    return info


def _jpeg_info(metadata: tuple[Part, ...]) -> dict[str | tuple[int, int], Any]:
    info: dict[str | tuple[int, int], Any] = {}
    pieces: list[bytes] = []
    for kind, content in metadata:
        if kind == b"exif":
            info["exif"] = info.get("exif", b"") + content
        elif kind == b"xmp":
            info["xmp"] = content
        elif len(content) >= 2:
            pieces.append(content)
    # Each part has its number from 1, the number of parts, and a part of the profile.
    pieces.sort(key=lambda piece: piece[0])
    if pieces and pieces[0][1] == len(pieces):
        info["icc_profile"] = b"".join(piece[2:] for piece in pieces)
    return info
