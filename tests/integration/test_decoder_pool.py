"""The processes that decode init images: results, limits, replacement, and their end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import numpy as np
import photos
import psutil
import pytest
import pytest_asyncio
from PIL import Image

from img2img_server.domain.params import Limits
from img2img_server.domain.resolve import fit_size
from img2img_server.domain.violations import Reason
from img2img_server.errors import ServerBusyError, UnavailableError
from img2img_server.imaging.base import CheckedImage, InvalidImageError
from img2img_server.imaging.decoder import ThreadDecoder
from img2img_server.imaging.pool import DecoderPool
from img2img_server.imaging.prepare import check_image, prepare_image

MEMORY = 448 * 2**20
pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = 60.0  # seconds; longer than anything takes on a busy machine
CPU_SECONDS = 0.03


@cache
def slow_jpeg(side: int = 2400) -> bytes:
    """Returns a progressive JPEG that takes about a second to decode."""
    noise = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    return photos.saved(Image.fromarray(noise), "JPEG", progressive=True, quality=50)


def check(
    pool: DecoderPool | ThreadDecoder, data: bytes, tenant: str = "alpha", **more: Any
) -> Any:
    return pool.check(tenant, data, width=256, height=192, limits=Limits(), **more)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not condition():  # noqa: ASYNC110 - processes set no event
            await asyncio.sleep(0.01)


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process; infinity once it has ended."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            times = process.cpu_times()
            return float(times.user + times.system)
    return float("inf")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[DecoderPool]:
    async with DecoderPool(2, MEMORY, 60.0, wait_seconds=LONG) as running:
        yield running


@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
async def test_processes_and_threads_give_equal_results(pool: DecoderPool, container: str) -> None:
    small = photos.saved(photos.photo(), container)
    large = photos.saved(photos.photo(1200, 900), container)

    for data in (small, large):
        assert await check(pool, data) == await check(ThreadDecoder(), data)
        pixels = await pool.prepare("alpha", data, width=320, height=256)
        assert np.array_equal(pixels, prepare_image(data, width=320, height=256))
        assert pixels.flags.writeable


async def test_the_size_is_fitted_to_the_image_where_it_is_decoded(pool: DecoderPool) -> None:
    fit = partial(fit_size, {"width": 256}, 512, Limits())

    checked = await check(pool, photos.saved(photos.photo(400, 200), "PNG"), fit=fit)

    assert isinstance(checked, CheckedImage)
    assert (checked.width, checked.height) == (256, 256)


async def test_refusals_are_those_of_the_image_check(pool: DecoderPool) -> None:
    for data in (b"", b"GIF89a", photos.jpeg()[:-500], photos.huge_png()):
        with pytest.raises(InvalidImageError) as here:
            check_image(data, width=256, height=192, limits=Limits())
        with pytest.raises(InvalidImageError) as there:
            await check(pool, data)
        assert there.value.violation == here.value.violation


async def test_a_refused_image_is_not_kept_in_memory(pool: DecoderPool) -> None:
    data = photos.jpeg()[:-400]
    gc.disable()
    try:
        references = sys.getrefcount(data)
        with suppress(InvalidImageError):  # pytest.raises would keep the error.
            await check(pool, data)
        # The loop releases the finished task a moment later.
        await until(lambda: sys.getrefcount(data) == references)
    finally:
        gc.enable()


async def test_a_tenant_with_many_images_leaves_a_process_to_others(pool: DecoderPool) -> None:
    data = slow_jpeg(1500)
    alpha = [asyncio.create_task(check(pool, data)) for _ in range(8)]
    await until(lambda: pool.used("alpha") == 1)

    for _ in range(5):
        await check(pool, photos.jpeg(), "beta")
        assert pool.used("alpha") == 1

    assert not all(task.done() for task in alpha)
    await asyncio.gather(*alpha)


async def test_a_caller_that_gives_up_leaves_a_usable_process(pool: DecoderPool) -> None:
    before = set(pool.pids)
    lost = [asyncio.create_task(check(pool, slow_jpeg(800))) for _ in range(3)]
    await until(lambda: pool.used("alpha") == 1)
    for task in lost:
        task.cancel()
    await asyncio.gather(*lost, return_exceptions=True)

    await check(pool, photos.jpeg())

    assert set(pool.pids) == before
    await until(lambda: pool.used("alpha") == 0)


async def test_the_kernel_ends_a_decoder_at_its_deadline() -> None:
    data = slow_jpeg(3000)
    deadline = CPU_SECONDS * (1 + 9 / 5)
    async with DecoderPool(2, MEMORY, CPU_SECONDS, wait_seconds=LONG) as pool:
        idle = {pid: cpu_seconds(pid) for pid in pool.pids}
        slow = asyncio.create_task(check(pool, data))
        used, limits = dict(idle), set()
        async with asyncio.timeout(LONG):
            while not slow.done():
                for pid in idle:
                    if (seconds := cpu_seconds(pid)) < float("inf"):
                        used[pid] = seconds
                        limits |= data_limits(pid)
                await asyncio.sleep(0.001)

        with pytest.raises(InvalidImageError, match="within the limits") as refused:
            await slow
        assert "takes too long to decode" in refused.value.violation.cause
        assert refused.value.violation.reason == Reason.INVALID_IMAGE
        (ended,) = {pid for pid in idle if cpu_seconds(pid) == float("inf")}
        # Two clock ticks are the resolution of the measurement.
        assert used[ended] - idle[ended] <= CPU_SECONDS + deadline + 0.02
        # The kernel also knew a limit of its memory.
        assert {limit for limit in limits if limit < 2**30}

        # The other process serves meanwhile, and a new one takes the place of the lost one.
        assert await check(pool, photos.jpeg(), "beta")
        await until(lambda: len(pool.pids) == 2)
        assert ended not in pool.pids
        assert await check(pool, photos.jpeg())


def data_limits(pid: int) -> set[int]:
    """Returns the soft limit of the memory of a process, if there is one."""
    with suppress(OSError), open(f"/proc/{pid}/limits") as file:
        soft = next(line for line in file if line.startswith("Max data size")).split()[3]
        return {int(soft)} if soft != "unlimited" else set()
    return set()


async def test_images_wait_for_memory_or_are_refused() -> None:
    large = photos.saved(photos.photo(1600, 1200), "WEBP", method=0)
    async with DecoderPool(2, 64 * 2**20, 60.0, wait_seconds=0.0) as pool:
        held = pool.memory.try_take("alpha", 50 * 2**20)
        with pytest.raises(ServerBusyError) as refused:
            await check(pool, large, "beta")
        assert refused.value.retry_seconds
        assert await check(pool, photos.jpeg(), "beta")  # Small images need no share.
        held.release()
        assert await check(pool, large, "beta")

        with pytest.raises(InvalidImageError) as rejected:
            await check(pool, photos.saved(photos.photo(4000, 3000), "WEBP", method=0), "beta")
        assert "too much memory to decode" in rejected.value.violation.cause


async def test_a_lost_process_is_replaced_and_its_caller_may_retry() -> None:
    async with DecoderPool(1, MEMORY, 60.0) as pool:
        (lost,) = pool.pids
        slow = asyncio.create_task(check(pool, slow_jpeg()))
        await until(lambda: pool.used("alpha") == 1)
        os.kill(lost, signal.SIGKILL)

        with pytest.raises(UnavailableError):
            await slow
        assert await check(pool, photos.jpeg())
        assert lost not in pool.pids
        pids = pool.pids

    assert all(cpu_seconds(pid) == float("inf") for pid in [lost, *pids])


PARENT = """
import asyncio, sys
from img2img_server.domain.params import Limits
from img2img_server.imaging.pool import DecoderPool
async def main():
    data = sys.stdin.buffer.read()
    async with DecoderPool(2, 2**29, 600.0) as pool:
        task = asyncio.create_task(
            pool.check("a", data, width=256, height=256, limits=Limits()))
        await asyncio.sleep(0.01)
        print(*pool.pids, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_decoder_outlives_its_parent(number: signal.Signals) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin
    assert parent.stdout
    parent.stdin.write(slow_jpeg())
    parent.stdin.close()
    pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
    assert len(pids) == 2

    parent.send_signal(number)
    await parent.wait()

    await until(lambda: all(cpu_seconds(pid) == float("inf") for pid in pids))
