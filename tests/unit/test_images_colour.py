"""Embedded ICC profiles: colours are converted to sRGB, and no profile makes an image unusable."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import photos
import profiles
import pytest
from PIL import Image, ImageCms

from img2img_server.domain.params import Limits
from img2img_server.imaging.metadata import MAX_PROFILE_BYTES
from img2img_server.imaging.prepare import CONVERT_MAX_PIXELS, check_image, prepare_image

Pixels = npt.NDArray[np.uint8]
P3, ADOBE = profiles.rgb_profile(profiles.DISPLAY_P3), profiles.rgb_profile(profiles.ADOBE_RGB)
PILLOWS_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def converted(image: Image.Image, profile: bytes) -> Pixels:
    """Returns the whole image converted by Little CMS."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    result = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    assert result
    return np.asarray(result)


def prepared(data: bytes, width: int, height: int) -> Pixels:
    check_image(data, width=width, height=height, limits=Limits())
    return prepare_image(data, width=width, height=height)


def largest(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("profile", [P3, ADOBE], ids=["display-p3", "adobe-rgb"])
def test_colours_are_converted_from_the_embedded_profile(container: str, profile: bytes) -> None:
    lossless = {"lossless": True} if container == "WEBP" else {}
    data = photos.saved(photos.photo(), container, icc_profile=profile, **lossless)
    stored = photos.opened(data).convert("RGB")

    pixels = prepared(data, 512, 512)

    assert largest(pixels, converted(stored, profile)) <= 1
    assert largest(pixels, np.asarray(stored)) > 15


@pytest.mark.parametrize("size", [(1024, 768), (2500, 1801)])
def test_colours_of_large_images_are_converted_after_they_are_averaged_down(
    size: tuple[int, int],
) -> None:
    photo = Image.fromarray(photos.photo()).resize(size, Image.Resampling.BICUBIC)
    data = photos.saved(photo, "PNG", icc_profile=P3, compress_level=1)
    first = photos.saved(Image.fromarray(converted(photo, P3)), "PNG", compress_level=1)
    wanted = prepare_image(first, width=512, height=384).astype(int)

    difference = np.abs(prepare_image(data, width=512, height=384) - wanted)

    assert difference.max() <= (1 if size[0] * size[1] <= CONVERT_MAX_PIXELS else 10)
    assert difference.mean() < 0.4


@pytest.mark.parametrize("profile", [PILLOWS_SRGB, profiles.rgb_profile(profiles.SRGB)])
@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
def test_an_srgb_profile_changes_nothing(container: str, profile: bytes) -> None:
    plain = photos.saved(photos.photo(), container)
    tagged = photos.saved(photos.photo(), container, icc_profile=profile)

    assert largest(prepared(tagged, 512, 512), prepared(plain, 512, 512)) == 0


@pytest.mark.parametrize("container", ["PNG", "JPEG"])
def test_grey_is_converted_from_a_grey_profile(container: str) -> None:
    grey = Image.fromarray(photos.photo()).convert("L")
    profile = profiles.grey_profile(1.0)
    data = photos.saved(grey, container, icc_profile=profile)

    expected = converted(photos.opened(data), profile)
    assert largest(prepared(data, 512, 512), expected) <= 1


def test_cmyk_is_converted_from_its_profile_and_without_one_as_pillow_does() -> None:
    inks = Image.fromarray(photos.photo()).convert("CMYK")
    profile = profiles.cmyk_profile()
    tagged = photos.saved(inks, "JPEG", quality=95, icc_profile=profile)
    plain = photos.saved(inks, "JPEG", quality=95)

    assert largest(prepared(tagged, 512, 512), converted(photos.opened(tagged), profile)) <= 1
    assert largest(prepared(plain, 512, 512), np.asarray(photos.opened(plain).convert("RGB"))) <= 1


@pytest.mark.parametrize("container", ["PNG", "WEBP"])
def test_transparent_parts_are_put_on_white_after_the_conversion(container: str) -> None:
    layer = np.dstack([photos.photo(64, 64), np.full((64, 64), 255, np.uint8)])
    layer[:32, :, 3] = 0
    options: dict[str, Any] = {"lossless": True, "exact": True} if container == "WEBP" else {}
    data = photos.saved(layer, container, icc_profile=P3, **options)

    pixels = prepared(data, 64, 64)

    assert (pixels[:32] == 255).all()
    assert largest(pixels[32:], converted(Image.fromarray(layer[32:, :, :3]), P3)) <= 1


def test_a_transparent_palette_image_is_converted_too() -> None:
    image = Image.fromarray(photos.photo(64, 64)).quantize(32)
    data = photos.saved(image, "PNG", icc_profile=P3, transparency=3)
    expected = converted(image.convert("RGB"), P3).copy()
    expected[np.asarray(image) == 3] = 255

    assert largest(prepared(data, 64, 64), expected) <= 1


def floating_point(profile: bytes) -> bytes:
    """Returns a profile whose tag table has a chain of floating-point steps."""
    return profile.replace(b"cprt", b"D2B0", 1)


@pytest.mark.parametrize(
    "profile",
    [
        b"not a profile",
        P3[:200],
        P3[:128] + b"\xff\xff\xff\xff" + P3[132:],
        bytes(len(P3)),
        P3.replace(b"rXYZ", b"zXYZ"),
        profiles.grey_profile(1.8),
        profiles.cmyk_profile(),
        floating_point(P3),
        P3 + bytes(MAX_PROFILE_BYTES),
    ],
    ids=["text", "cut", "tags", "zeros", "no red", "grey", "cmyk", "floating point", "too long"],
)
@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
def test_a_profile_that_cannot_be_used_is_ignored(container: str, profile: bytes) -> None:
    plain = photos.saved(photos.photo(64, 64), container)
    tagged = photos.saved(photos.photo(64, 64), container, icc_profile=profile)

    assert largest(prepared(tagged, 64, 64), prepared(plain, 64, 64)) == 0


@pytest.mark.parametrize(
    "chunk",
    [
        b"name\0\0" + b"not deflated",
        b"name\0\x07" + zlib.compress(P3),
        b"name",
        b"",
        b"name\0\0" + zlib.compress(bytes(2**25)),
    ],
)
def test_a_damaged_icc_chunk_of_a_png_is_ignored(chunk: bytes) -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in photos.photo(64, 64))
    data = photos.png(64, 64, rows, more=((b"iCCP", chunk),))

    assert largest(prepared(data, 64, 64), photos.photo(64, 64)) == 0


def test_a_profile_in_several_segments_counts_when_all_are_there() -> None:
    long = P3 + bytes(150_000)  # The profile fills three segments of a JPEG.
    data = photos.saved(photos.photo(64, 64), "JPEG", icc_profile=long)
    second = data.index(b"ICC_PROFILE\0\x02") - 4
    length = 2 + struct.unpack_from(">H", data, second + 2)[0]
    moved = data[second : second + length]
    rest = data[:second] + data[second + length :]
    place = rest.index(b"ICC_PROFILE\0\x01") - 4
    stored = np.asarray(photos.opened(data).convert("RGB"))

    assert largest(prepared(data, 64, 64), stored) > 15
    assert (
        largest(prepared(rest[:place] + moved + rest[place:], 64, 64), prepared(data, 64, 64)) == 0
    )
    assert largest(prepared(rest, 64, 64), stored) == 0
