"""Several workers on one bus: a load of 200 jobs while one is killed, one drained and one added."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from img2img_client import AsyncClient, Result
from img2img_client.events import Event, SampleFinished, Started, StepFinished, Succeeded
from img2img_server.nats.connection import connect
from img2img_server.nats.subjects import DEAD
from img2img_server.nats.subjects import JOBS as JOBS_STREAM
from tests.engine_bench import BOUND, difference
from tests.processes import Role
from tests.real_stack import RealStack, running_stack
from tests.stack import photo

JOBS = 200
SMALL_PHOTO = photo(256, 256)
# The number of jobs that are sent at once. The others follow when the added worker is ready.
EARLY = 150
FIRST = ("leda", "castor", "pollux")
KILLED, DRAINED, ADDED = "castor", "pollux", "helena"


def request(number: int) -> dict[str, Any]:
    """Returns a request that differs from all others, so that images cannot be confused."""
    return {
        "width": 256,
        "height": 256,
        "strength": (0.25, 0.5, 0.75)[number % 3],
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "seed": number,
        "output_format": "png",
        "safety_checker": False,  # This is the slowest part of such a small job.
    }


@dataclass
class Load:
    """Jobs, each with a caller that reads its stream to the end."""

    client: AsyncClient
    results: dict[int, Result] = field(default_factory=dict)
    events: dict[int, list[Event]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    seen: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def call(self, number: int) -> None:
        """Runs one caller, from its request to its image."""
        mine = self.events[number] = []
        async with self.client.stream("a cat", SMALL_PHOTO, **request(number)) as stream:
            async for event in stream:
                mine.append(event)
                self.names[number] = stream.job_name
                async with self.seen:
                    self.seen.notify_all()
            self.results[number] = await stream.result()
        async with self.seen:
            self.seen.notify_all()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with self.seen:
            await self.seen.wait_for(reached)

    def running_on(self, worker: str) -> set[int]:
        """Returns the jobs that the worker runs now."""
        return {
            number
            for number, events in self.events.items()
            if isinstance(events[-1] if events else None, StepFinished)
            and last_worker(events) == worker
        }

    def ended_by(self) -> Counter[str]:
        return Counter(result.job.worker for result in self.results.values())


def last_worker(events: list[Event]) -> str:
    return next(event.worker for event in reversed(events) if isinstance(event, Started))


@asynccontextmanager
async def three_workers(folder: Path) -> AsyncIterator[tuple[RealStack, dict[str, Role]]]:
    limits = {"IMG2IMG_QUEUE_LIMIT": str(2 * JOBS), "IMG2IMG_ACK_WAIT_SECONDS": "3"}
    async with running_stack(folder, **limits) as stack, AsyncExitStack() as exits:
        contexts = [exits.enter_async_context(stack.worker(name)) for name in FIRST]
        yield stack, dict(zip(FIRST, await asyncio.gather(*contexts), strict=True))


async def frozen_jobs(load: Load, worker: Role) -> set[int]:
    """Freezes the worker in the middle of jobs and returns them.

    Events arrive late on a busy machine, so the records of the frozen jobs are read: some of these
    jobs have ended in the meantime.
    """
    await load.until(lambda: len(load.results) >= 20)
    while True:
        await load.until(lambda: bool(load.running_on(KILLED)))
        worker.freeze()
        jobs = {n: await load.client.get(load.names[n]) for n in load.running_on(KILLED)}
        running = {n for n, job in jobs.items() if (job.state, job.worker) == ("running", KILLED)}
        if running:
            return running
        worker.thaw()
        async with load.seen:
            await load.seen.wait()


async def disturbed(load: Load, stack: RealStack, workers: dict[str, Role]) -> set[int]:
    """Runs the load while workers stop and start. Returns the jobs that the killed worker left."""
    async with asyncio.TaskGroup() as callers:
        for number in range(EARLY):
            callers.create_task(load.call(number))
        victims = await frozen_jobs(load, workers[KILLED])
        await workers[KILLED].kill()
        async with stack.worker(ADDED):
            late = [callers.create_task(load.call(number)) for number in range(EARLY, JOBS)]
            await load.until(lambda: bool(load.running_on(DRAINED)))
            assert await workers[DRAINED].stop() == 0
            await asyncio.gather(*late)
            await load.until(lambda: len(load.results) == JOBS)
    # The last events of other jobs were still on their way when it was killed.
    jobs = {number: load.results[number].job for number in victims}
    return {n for n, job in jobs.items() if (job.worker, job.attempt) != (KILLED, 1)}


@pytest.mark.slow
async def test_workers_are_killed_drained_and_added_under_load_and_every_caller_gets_one_image(
    tmp_path: Path,
) -> None:
    async with three_workers(tmp_path) as (stack, workers), stack.client() as client:
        calm, load = Load(client), Load(client)
        async with asyncio.TaskGroup() as callers:
            for number in range(JOBS):
                callers.create_task(calm.call(number))
        assert set(calm.ended_by()) == set(FIRST)
        victims = await disturbed(load, stack, workers)
        assert victims
        async with connect([stack.environment["IMG2IMG_NATS_URL"]]) as link:
            left = {n: (await link.js.stream_info(n)).state.messages for n in (JOBS_STREAM, DEAD)}
    assert left == {JOBS_STREAM: 0, DEAD: 0}  # No job is lost, and none failed.
    assert set(load.ended_by()) == {*FIRST, ADDED}
    for number in range(JOBS):
        events, result = load.events[number], load.results[number]
        assert (result.job.state, len(result.images)) == ("succeeded", 1)
        assert [event.sequence for event in events] == list(range(len(events)))
        assert sum(isinstance(event, Succeeded) for event in events) == 1
        assert isinstance(events[-1], Succeeded)
        if result.job.attempt == 1:
            assert sum(isinstance(event, SampleFinished) for event in events) == 1
        if number in victims:
            assert result.job.attempt > 1
            assert result.job.worker != KILLED
        assert difference(pixels(result), pixels(calm.results[number])) <= BOUND
    others = zip(range(JOBS - 1), range(1, JOBS), strict=True)
    assert (
        min(
            difference(pixels(calm.results[one]), pixels(calm.results[other]))
            for one, other in others
        )
        > 2 * BOUND
    )  # Every image is the right one.


def pixels(result: Result) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(result.images[0].data)))
