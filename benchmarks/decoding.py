"""Measures what the processes that decode init images add to a request, in pairs with threads.

    python -m benchmarks.decoding [--pairs 200]

Each pair checks and prepares the photo of the examples at 512x512 once in a process and once in a
thread, in alternating order and with pauses, as requests of one caller have them.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict

from benchmarks.overhead import PHOTO, sized
from img2img_server.domain.params import Limits
from img2img_server.imaging.decoder import ImageDecoder, ThreadDecoder
from img2img_server.imaging.pool import DecoderPool
from img2img_server.settings import Settings

PAUSE_SECONDS = 0.02


async def milliseconds(decoder: ImageDecoder, image: bytes) -> dict[str, float]:
    """Returns the times of one check and one preparation."""
    await asyncio.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    await decoder.check("bench", image, width=512, height=512, limits=Limits())
    checked = time.perf_counter()
    await asyncio.sleep(PAUSE_SECONDS)
    resumed = time.perf_counter()
    await decoder.prepare("bench", image, width=512, height=512)
    ended = time.perf_counter()
    return {"check": (checked - start) * 1e3, "prepare": (ended - resumed) * 1e3}


async def run(pairs: int) -> None:
    """Measures and prints the medians and the median of the differences."""
    image = sized(PHOTO.read_bytes())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    async with DecoderPool.of(Settings()) as pool:
        decoders: dict[str, ImageDecoder] = {"process": pool, "thread": ThreadDecoder()}
        for number in range(pairs + 3):
            for name in sorted(decoders, reverse=bool(number % 2)):
                found = await milliseconds(decoders[name], image)
                if number >= 3:
                    for task, took in found.items():
                        times[task, name].append(took)
    print("| ms | thread: median, least | process: median, least | median difference |")
    print("|---|---|---|---|")
    for task in ("check", "prepare"):
        thread, process = times[task, "thread"], times[task, "process"]
        more = statistics.median(b - a for a, b in zip(thread, process, strict=True))
        cells = [f"{statistics.median(each):.2f}, {min(each):.2f}" for each in (thread, process)]
        print(f"| {task} | {cells[0]} | {cells[1]} | {more:.2f} |")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    asyncio.run(run(parser.parse_args().pairs))


if __name__ == "__main__":
    main()
