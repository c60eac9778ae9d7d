"""F1, F2 and the pixels of F4: init images that are expensive to decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.attack import images
from benchmarks.attack.callers import create_jobs, spec
from benchmarks.attack.target import Attack, Progress, Target

Make = Callable[[Mapping[str, Any]], list[bytes]]


def _flood(make: Make, **fields: Any) -> Any:
    """Returns an attack that sends these images over and over, `calls` at a time."""

    async def run(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
        files = make(sizes)
        specs = [spec(files[at % len(files)], **fields) for at in range(sizes["calls"])]
        await create_jobs(target, progress, specs)

    return run


def _scans(sizes: Mapping[str, Any]) -> list[bytes]:
    return [images.jpeg_of_scans(sizes["scans"], sizes["side"])]


def _formats(sizes: Mapping[str, Any]) -> list[bytes]:
    return [images.textured(sizes["side"], name) for name in ("JPEG", "PNG", "WEBP")]


ATTACKS = (
    Attack(
        "F1-hidden-scans",
        "JPEG of thousands of scans behind a comment with an end marker",
        _flood(_scans),
        {"calls": 7, "scans": 4000, "side": 7000},
    ),
    Attack(
        "F1-most-scans",
        "JPEG of 62 MP with as many scans as are accepted",
        _flood(_scans),
        {"calls": 12, "scans": 64, "side": 7900},
        {"calls": 4},
    ),
    Attack(
        "F1-scans-for-workers",
        "JPEG of 4 MP with as many scans as are accepted, which is sent on to the worker",
        _flood(_scans),
        {"calls": 12, "scans": 64, "side": 2048},
    ),
    Attack(
        "F2-plain-jpeg",
        "many JPEGs of 62 MP at once, of one colour",
        _flood(lambda sizes: [images.plain(sizes["side"], "JPEG")]),
        {"calls": 40, "side": 7900},
        {"calls": 20, "side": 7900},
    ),
    Attack(
        "F2-plain-png",
        "many PNGs of 62 MP at once, of one colour",
        _flood(lambda sizes: [images.plain(sizes["side"], "PNG")]),
        {"calls": 40, "side": 7900},
    ),
    Attack(
        "F2-formats",
        "many large ordinary images at once, of every format",
        _flood(_formats),
        {"calls": 30, "side": 5000},
    ),
    Attack(
        "F2-interlaced-png",
        "interlaced PNGs with 16 bits a sample",
        _flood(lambda sizes: [images.png_interlaced(sizes["side"])]),
        {"calls": 12, "side": 7000},
    ),
    Attack(
        "F2-lossless-webp",
        "lossless WebP of a photo, slow to decode",
        _flood(lambda sizes: [images.textured(sizes["side"], "WEBP", lossless=True)]),
        {"calls": 20, "side": 2500},
    ),
    Attack(
        "F2-png-text",
        "PNGs whose text chunk inflates to 50 MB",
        _flood(lambda sizes: [images.png_with_bomb_chunk(256, sizes["bytes"])]),
        {"calls": 20, "bytes": 50_000_000},
    ),
    Attack(
        "F4-webp-pixels",
        "WebP of a few bytes and 17 to 62 MP, many at once",
        _flood(lambda sizes: [images.webp_of_one_colour(side) for side in sizes["sides"]]),
        {"calls": 12, "sides": [7871, 4096, 4096, 4096, 4096, 4096]},
    ),
)
