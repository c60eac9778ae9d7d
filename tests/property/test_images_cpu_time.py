"""The CPU time that a decoder process spends on one file is bounded: ordinary, damaged and hostile
files of every accepted format, and files of other formats.

TEST_EXAMPLES sets the number of files, see CONTRIBUTING.md.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any

import photos
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from img2img_server.domain.params import Limits
from img2img_server.imaging.base import InvalidImageError
from img2img_server.imaging.cost import CPU_UNITS, CPU_UNITS_PER_MEGAPIXEL
from img2img_server.imaging.header import HeaderError, read_header
from img2img_server.imaging.pool import DecoderPool
from img2img_server.settings import Settings
from tests.property.test_images import JPEG_FILES, PNG_FILES, content, examples, jpeg_file, png_file

CPU_SECONDS = Settings().decode_cpu_seconds
TICKS = 0.03  # seconds; two ticks of the kernel's clock, and the response
Runner = tuple[asyncio.Runner, DecoderPool]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Runner]:
    with asyncio.Runner() as runner:
        pool = DecoderPool(1, 2**30, CPU_SECONDS)
        runner.run(pool.__aenter__())
        yield runner, pool
        runner.run(pool.__aexit__(None, None, None))


def bound(data: bytes) -> float:
    """Returns the stated limit: docs/behaviour.md."""
    try:
        pixels = read_header(data).pixels
    except HeaderError:
        pixels = 0
    pixels = min(pixels, Limits().max_image_pixels)
    # The part until the size is known has the limit of an image without pixels.
    return CPU_SECONDS * (2 * CPU_UNITS + CPU_UNITS_PER_MEGAPIXEL * pixels / 1e6) + TICKS


def cpu_seconds(decoder: Runner, data: bytes) -> float:
    """Returns the CPU time that the check and the preparation of a file took."""
    runner, pool = decoder
    (pid,) = pool.pids
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    size = {"width": 256, "height": 256}

    async def run() -> None:
        await pool.check("alpha", data, **size, limits=Limits())  # type: ignore[arg-type]
        await pool.prepare("alpha", data, **size)  # type: ignore[arg-type]

    try:
        runner.run(run())
    except InvalidImageError as error:
        assert "takes too long" not in error.violation.cause  # noqa: PT017
    return float(sum(process.cpu_times()[:2]) - before)


def webp_file(made: dict[str, Any]) -> bytes:
    width, height = made["size"]
    pixels = content(made["content"], made["seed"], min(width, 16_383), height, 4, 255)
    lossless = bool(made["seed"] % 2)
    return photos.saved(Image.fromarray(pixels), "WEBP", lossless=lossless, method=0)


def other_file(made: dict[str, Any]) -> bytes:
    container = ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"][made["seed"] % 6]
    return photos.saved(photos.quadrants(), container)


@examples
@given(png=PNG_FILES, jpeg=JPEG_FILES, kind=st.integers(0, 3), data=st.data())
def test_any_file_takes_less_cpu_time_than_stated(
    decoder: Runner, png: dict[str, Any], jpeg: dict[str, Any], kind: int, data: st.DataObject
) -> None:
    match kind:
        case 0:
            file = png_file(png)[0]
        case 1:
            file = jpeg_file(jpeg)
        case 2:
            file = webp_file(png)
        case _:
            file = other_file(png)
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(file), len(file) // 2]))

    used = cpu_seconds(decoder, bytes(damaged[:end]))

    # The check and the preparation are two requests.
    assert used <= 2 * bound(bytes(damaged[:end]))


def empty_scans(side: int, scans: int, between: bytes = b"") -> bytes:
    """Returns a progressive JPEG of many pixels whose scans hold a few bytes each."""
    small = photos.saved(photos.photo(16, 16), "JPEG", progressive=True)
    size = small.index(b"\xff\xc2") + 5
    first, end = small.index(b"\xff\xda"), small.rindex(b"\xff\xd9")
    scan = small[first : small.index(b"\xff\xc4", first)]
    large = small[:size] + struct.pack(">HH", side, side) + small[size + 4 : end]
    return large + (between + scan) * scans + b"\xff\xd9"


COMMENT = b"\xff\xfe\0\x04\xff\xd9"
HOSTILE = {
    "JPEG, 60 empty scans": lambda: empty_scans(1500, 50),
    "JPEG, scans behind comments": lambda: empty_scans(4000, 4000, COMMENT),
    "JPEG, scans behind fill bytes": lambda: empty_scans(4000, 4000, b"\xff\xff"),
    "PNG, 64 megapixels that are missing": lambda: photos.lying_png(8000, 8000),
    "PNG, one colour": lambda: photos.flat_png(3000, 3000),
    "PNG, a text bomb": lambda: photos.png(
        8, 8, bytes(200), more=((b"zTXt", b"c\0\0" + photos.text_bomb()),)
    ),
    "WebP, one colour": lambda: photos.saved(
        Image.new("RGBA", (3000, 3000)), "WEBP", lossless=True
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_less_cpu_time_than_stated(decoder: Runner, name: str) -> None:
    file = HOSTILE[name]()

    assert cpu_seconds(decoder, file) <= 2 * bound(file)
