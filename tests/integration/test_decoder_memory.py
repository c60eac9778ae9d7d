"""The memory of a process while it decodes stays within the estimate for the image."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import photos
import pytest
import pytest_asyncio
from PIL import Image

from img2img_server.domain.params import Limits
from img2img_server.imaging.cost import Cost
from img2img_server.imaging.pool import DecoderPool
from img2img_server.imaging.prepare import check_image

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIDE = 2100  # 4.4 megapixels: above all thresholds for small images
RAMP = (np.add.outer(np.arange(SIDE), np.arange(SIDE)) // 20 % 256).astype(np.uint8)
RGB = np.dstack([RAMP, RAMP.T, RAMP])
RGBA = np.dstack([RGB, RAMP])


def saved(pixels: np.ndarray, container: str, mode: str = "", **options: object) -> bytes:
    image = Image.fromarray(pixels)
    file = BytesIO()
    (image.convert(mode) if mode else image).save(file, container, **options)
    return file.getvalue()


def png(
    colour: int, depth: int, side: int = SIDE, *, key: bool = False, interlaced: bool = False
) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    values = np.repeat(RAMP[:side, :side, None], channels, -1)
    more = [(b"PLTE", bytes(range(256)) * 3)] if colour == 3 else []
    if key:
        more.append((b"tRNS", bytes(range(256)) if colour == 3 else b"\0\1" * channels))
    return photos.any_png(
        values.astype(np.uint16) * 257 if depth == 16 else values,
        depth=depth,
        colour=colour,
        interlaced=interlaced,
        filters=(0,),
        level=1,
        chunk_bytes=2**20,
        more=tuple(more),
    )


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: saved(RGB, "JPEG"),
    "JPEG, turned": lambda: saved(RGB, "JPEG", exif=photos.exif(6)),
    "JPEG, progressive": lambda: saved(RGB, "JPEG", progressive=True, subsampling=0),
    "JPEG, CMYK, progressive": lambda: saved(RGB, "JPEG", "CMYK", progressive=True),
    "JPEG, bytes after the rows": lambda: saved(RGB, "JPEG")[:-2] + bytes(50) + b"\xff\xd9",
    "WebP, lossy": lambda: saved(RGB, "WEBP", method=0),
    "WebP, lossless, transparent": lambda: saved(RGBA, "WEBP", method=0, lossless=True),
    "WebP, animated": lambda: saved(
        RGB, "WEBP", method=0, save_all=True, append_images=[Image.fromarray(255 - RGB)]
    ),
    "PNG, RGB": lambda: png(2, 8, interlaced=True),
    "PNG, RGBA": lambda: png(6, 8),
    "PNG, palette": lambda: png(3, 8, key=True),
    "PNG, grey of 16 bits": lambda: png(0, 16, key=True),
    "PNG, RGB of 16 bits": lambda: png(2, 16, 1200, key=True),
    "PNG, grey with alpha": lambda: png(4, 8),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[DecoderPool]:
    async with DecoderPool(1, 2**30, 600.0) as running:
        yield running


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident_bytes(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize("name", FILES)
async def test_decoding_needs_no_more_memory_than_estimated(pool: DecoderPool, name: str) -> None:
    data, costs = FILES[name](), list[Cost]()
    options = {"width": 1536, "height": 1536, "limits": Limits()}
    check_image(data, **options, admit=costs.append)  # type: ignore[arg-type]
    (pid,) = pool.pids
    forget_peak(pid)
    before = resident_bytes(pid, "VmRSS")

    await pool.check("alpha", data, **options)  # type: ignore[arg-type]

    assert resident_bytes(pid, "VmHWM") - before <= costs[0].memory_bytes
