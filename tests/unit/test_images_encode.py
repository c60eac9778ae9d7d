"""Encoded images: their decoded pixels and their metadata."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import imagecodecs
import numpy as np
import numpy.typing as npt
import photos
import pytest
from PIL import Image

from img2img_server.domain.events import EncodedImage
from img2img_server.domain.params import ImageFormat
from img2img_server.imaging.encode import encode_image, encoded, preview_jpeg

Pixels = npt.NDArray[np.uint8]


def with_pillow(data: bytes) -> Pixels:
    with Image.open(BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def with_libspng(data: bytes) -> Pixels:
    return imagecodecs.spng_decode(data)


def with_libpng(data: bytes) -> Pixels:
    return imagecodecs.png_decode(data)


def chunks(data: bytes) -> list[bytes]:
    names, offset = [], 8
    while offset < len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        names.append(kind)
        offset += 12 + length
    return names


@pytest.mark.parametrize("decode", [with_pillow, with_libpng, with_libspng])
@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (256, 1024), (1, 1), (3, 33), (33, 1)])
def test_a_png_decodes_to_exactly_the_pixels(
    decode: Callable[[bytes], Pixels], size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for pixels in (photos.photo(*size), noise, np.zeros_like(noise), np.full_like(noise, 255)):
        assert np.array_equal(decode(encode_image(pixels, ImageFormat.PNG)), pixels)


def test_a_view_of_a_larger_image_is_encoded_like_its_copy() -> None:
    view = photos.photo()[::-2, 8:200]

    for image_format in ImageFormat:
        assert encode_image(view, image_format) == encode_image(view.copy(), image_format)


def test_a_png_holds_no_metadata() -> None:
    data = encode_image(photos.photo(), ImageFormat.PNG)

    assert chunks(data) == [b"IHDR", b"IDAT", b"IEND"]


@pytest.mark.parametrize("path", [photos.CAT, photos.COFFEE])
def test_a_png_is_not_much_larger_than_what_pillow_writes_in_haste(path: object) -> None:
    for side in (512, 1024):
        pixels = photos.photo(side, side, path)
        hasty = photos.saved(pixels, "PNG", compress_level=1)
        assert len(encode_image(pixels, ImageFormat.PNG)) < 1.15 * len(hasty)


def test_a_jpeg_keeps_full_colour_resolution_and_looks_the_same() -> None:
    pixels = photos.photo()
    data = encode_image(pixels, ImageFormat.JPEG)

    with Image.open(BytesIO(data)) as image:
        assert {(across, down) for _, across, down, _ in image.layer} == {(1, 1)}
        assert image.quantization == Image.open(BytesIO(photos.jpeg(pixels, 95))).quantization
    assert quality(with_pillow(data), pixels) > 38
    assert b"Exif" not in data


def test_a_webp_looks_the_same() -> None:
    pixels = photos.photo()

    assert quality(with_pillow(encode_image(pixels, ImageFormat.WEBP)), pixels) > 33


def quality(one: Pixels, other: Pixels) -> float:
    """Returns the peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_an_encoded_image_is_described(image_format: ImageFormat) -> None:
    pixels = photos.photo(320, 256)
    data = encode_image(pixels, image_format)

    assert encoded(pixels, image_format) == EncodedImage(
        data=data,
        media_type=f"image/{image_format.value}",
        sha256=hashlib.sha256(data).hexdigest(),
        width=320,
        height=256,
    )
    assert Image.open(BytesIO(data)).format == image_format.name


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_the_same_pixels_give_the_same_file_in_every_thread(image_format: ImageFormat) -> None:
    pixels = photos.photo()
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: encode_image(pixels, image_format), range(8)))

    assert len(files) == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 512), (256, 256)), ((1024, 256), (256, 64)), ((256, 1024), (64, 256))],
)
def test_a_preview_is_at_most_256_pixels_long(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    preview = preview_jpeg(photos.photo(*size))

    with Image.open(BytesIO(preview.data)) as image:
        assert (image.format, image.size) == ("JPEG", expected)
    assert (preview.width, preview.height) == expected
    assert preview.media_type == "image/jpeg"
    assert len(preview.data) < 40_000


def test_a_small_preview_is_not_enlarged() -> None:
    preview = preview_jpeg(photos.photo(64, 64))

    assert (preview.width, preview.height) == (64, 64)


@pytest.mark.parametrize("image_format", [ImageFormat.JPEG, ImageFormat.WEBP])
def test_quality_is_that_of_the_caller_or_the_default(image_format: ImageFormat) -> None:
    pixels = photos.photo()
    default = {ImageFormat.JPEG: 95, ImageFormat.WEBP: 90}[image_format]
    sizes = [len(encode_image(pixels, image_format, quality)) for quality in (1, 50, default, 100)]
    assert sizes == sorted(set(sizes))
    assert len(encode_image(pixels, image_format)) == sizes[2]
