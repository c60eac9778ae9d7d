"""Converts the colours of an image from its embedded ICC profile to sRGB."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
import structlog
from PIL import Image, ImageCms

log = structlog.get_logger(__name__)

# Larger profiles are rare, hold tables, and their transforms need much memory.
_CACHED_PROFILE_BYTES = 2**16
# Differences up to this, of 255, are rounding errors between variants of sRGB.
_SAME = 1
# Tags with any number of floating-point steps, which take an unlimited time to read.
_UNBOUNDED_TAGS = (b"D2B0", b"D2B1", b"D2B2", b"D2B3")


def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform from a profile to sRGB, for images of a mode (L, RGB or CMYK).

    Returns None where the colours are sRGB already, and where the profile is damaged or made for
    another mode.
    """
    if not profile:
        return None
    if len(profile) > _CACHED_PROFILE_BYTES:
        return _build(profile, mode)
    return _cached(profile, mode)


def apply_transform(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """Returns the image in sRGB."""
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # Pillow returns None for in-place transforms only.
    return converted


def _build(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        if any(tag in _UNBOUNDED_TAGS for tag in _tags(profile)):
            raise ValueError("floating-point pipelines are not read")
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if _changes_nothing(transform, mode) else transform
    except Exception as error:  # A damaged profile does not make the image invalid.
        log.info("icc_profile_ignored", reason=str(error), mode=mode)
        return None


_cached = lru_cache(maxsize=32)(_build)


def _tags(profile: bytes) -> list[bytes]:
    """Returns the names in the tag table: a count after 128 bytes, then entries of 12 bytes.

    Little CMS refuses profiles of more than 100.
    """
    count = min(int.from_bytes(profile[128:132], "big"), 100)
    end = min(132 + 12 * count, len(profile))
    return [profile[at : at + 4] for at in range(132, end, 12)]


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Returns whether the transform keeps greys, primaries and the colours between them."""
    if mode == "CMYK":
        return False
    assert mode in ("L", "RGB")
    steps = np.arange(0, 256, 17 if mode == "RGB" else 1, dtype=np.uint8)
    axes = (steps,) * len(mode)
    colours = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(mode))
    before = Image.fromarray(colours[..., 0] if mode == "L" else colours)
    after = np.asarray(apply_transform(before, transform)).astype(int)
    difference = after - np.asarray(before.convert("RGB"))
    return bool(np.abs(difference).max() <= _SAME)
