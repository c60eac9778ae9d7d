"""The scenarios. Each returns a ratio and the largest that is good."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet.device import Costs
from benchmarks.fleet.stack import TENANTS, Fleet, Times, running_fleet
from img2img.v1 import job_pb2

STEPS = 20
LONG_STEPS = 50
SHORT_STEPS = 4


@dataclass(frozen=True)
class Result:
    """One measured line: `value` should not exceed `most`."""

    line: str
    value: float
    most: float
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.value <= self.most


@asynccontextmanager
async def fleet_of(costs: Costs, workers: int) -> AsyncIterator[Fleet]:
    with tempfile.TemporaryDirectory() as folder:
        async with running_fleet(Path(folder), costs, workers) as fleet:
            yield fleet


async def _leave(jobs: list[asyncio.Task[Times]]) -> None:
    """Leaves jobs that still run. Raises the error of one that failed."""
    for job in jobs:
        if job.done():
            job.result()
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


async def equal_jobs(costs: Costs, *, jobs: int = 14, workers: int = 2) -> Result:
    """Runs equal jobs on some workers and returns the makespan as a multiple of the ideal one.

    Where batches pay, the ideal is that each worker runs its jobs in full batches.
    """
    async with fleet_of(costs, workers) as fleet:
        began, busy = time.monotonic(), fleet.busy_seconds
        done = await asyncio.gather(*(fleet.start("a", STEPS) for _ in range(jobs)))
        took, busy = time.monotonic() - began, fleet.busy_seconds - busy
        share = -(-jobs // workers)
        ideal = share * STEPS * costs.step_seconds()
        if costs.batches_pay:
            ideal = STEPS * (costs.fixed_seconds + share * costs.row_seconds)
        counts = sorted(sum(each.worker == f"w{n + 1}" for each in done) for n in range(workers))
        line = f"makespan of {jobs} equal jobs on {workers} workers, of the ideal"
        return Result(
            line,
            took / ideal,
            1.1 if not costs.batches_pay else 1.5,
            f"{counts} jobs, devices busy {busy / workers / took:.1%}",
        )


async def joining_worker(costs: Costs) -> Result:
    """Adds a worker to a busy one and returns the seconds until it starts a waiting job."""
    async with fleet_of(costs, 1) as fleet:
        jobs = [fleet.start("a", 2 * STEPS) for _ in range(8)]
        await asyncio.sleep(1.0)
        began = time.monotonic()
        await fleet.add_workers(1)
        done = await asyncio.gather(*jobs)
        starts = [each.started - began for each in done if each.worker == "w2"]
        first = min(starts, default=float("inf"))
        return Result("seconds until a joining worker starts a waiting job", first, 2.0)


async def more_workers(costs: Costs, *, jobs: int = 10, workers: int = 4) -> Result:
    """Compares the throughput of some workers with that of one, with equal jobs.

    The value is the multiple that is missing.
    """
    took = {}
    for count in (1, workers):
        async with fleet_of(costs, count) as fleet:
            began = time.monotonic()
            await asyncio.gather(*(fleet.start("a", STEPS) for _ in range(jobs * count)))
            took[count] = time.monotonic() - began
    factor = workers * took[1] / took[workers]
    line = f"throughput of {workers} workers, of one: {workers} minus it"
    return Result(line, workers - factor, 0.1, f"{factor:.2f} times")


async def short_behind_long(costs: Costs, *, workers: int, long_jobs: int = 15) -> Result:
    """Measures short jobs of one tenant behind long ones of another: latency, of that alone."""

    async def shorts(fleet: Fleet) -> float:
        one = [await fleet.run("b", SHORT_STEPS) for _ in range(3)]
        two = await asyncio.gather(*(fleet.start("b", SHORT_STEPS) for _ in range(2)))
        return statistics.mean([*(each.latency for each in one), max(x.latency for x in two) / 2])

    async with fleet_of(costs, workers) as fleet:
        alone = await shorts(fleet)
        jobs = [fleet.start("a", LONG_STEPS) for _ in range(long_jobs)]
        await asyncio.sleep(1.0)
        behind = await shorts(fleet)
        await _leave(jobs)
    most = 3 + costs.step_seconds() / alone
    line = f"short jobs of b behind {long_jobs} long ones of a on {workers} workers, of alone"
    return Result(line, behind / alone, most, f"{alone:.2f} s, {behind:.2f} s")


async def realtime_behind_batch(costs: Costs) -> Result:
    """Measures realtime jobs behind eight batch jobs: their latency, of that alone."""

    async def realtime(fleet: Fleet) -> float:
        return statistics.mean([(await fleet.run("a", STEPS)).latency for _ in range(3)])

    async with fleet_of(costs, 1) as fleet:
        alone = await realtime(fleet)
        batch = {"lane": job_pb2.LANE_BATCH}
        jobs = [fleet.start("a", LONG_STEPS, **batch) for _ in range(8)]
        await asyncio.sleep(1.0)
        behind = await realtime(fleet)
        await _leave(jobs)
    detail = f"{alone:.2f} s, {behind:.2f} s"
    return Result("realtime jobs behind batch jobs, of alone", behind / alone, 2.0, detail)


async def drawn_load(costs: Costs, seed: int, *, workers: int = 2, jobs: int = 40) -> Result:
    """Runs tenants, sizes and arrivals drawn from a seed; returns the 95th percentile of slowdowns.

    The slowdown of a job is its latency, of the time that its steps take alone. Arrivals fill nine
    tenths of the workers.
    """
    rng = random.Random(seed)
    drawn, work = [], 0.0
    for _ in range(jobs):
        steps, side = rng.choice((2, 4, 8, 30)), rng.choice((256, 256, 512))
        tenant = rng.choice(TENANTS[:2] + TENANTS[:5])
        work += steps * costs.step_seconds(side)
        drawn.append((tenant, steps, side, rng.random()))
    span = work / workers / 0.9
    async with fleet_of(costs, workers) as fleet:

        async def one(tenant: str, steps: int, side: int, place: float) -> tuple[Times, float]:
            await asyncio.sleep(place * span)
            times = await fleet.run(tenant, steps, side)
            return times, times.latency / (steps * costs.step_seconds(side))

        done = await asyncio.gather(*(one(*each) for each in drawn))
    slow = sorted(slowdown for _, slowdown in done)
    p50, p95 = slow[len(slow) // 2], slow[int(0.95 * len(slow))]
    line = f"p95 slowdown of {jobs} drawn jobs on {workers} workers, seed {seed}"
    return Result(line, p95, float("inf"), f"median {p50:.2f}")


# The stages of a job, which add up to its total.
STAGES = (
    "fetch",
    "queue",
    "held",
    "prepare",
    "encode",
    "denoise",
    "paused",
    "decode",
    "safety",
    "image_encode",
    "upload",
)


def unnamed_share(timings: job_pb2.Timings) -> float:
    """Returns the time in no stage or in two, as a share of the allowed 2 % or 5 ms."""
    known = timings.DESCRIPTOR.fields_by_name  # An earlier version has fewer stages.
    stages = [stage for stage in STAGES if stage in known]
    named = sum(getattr(timings, stage).ToNanoseconds() for stage in stages) / 1e9
    total = timings.total.ToNanoseconds() / 1e9
    return abs(total - named) / max(0.02 * total, 0.005)


async def stages_add_up(costs: Costs, *, jobs: int = 200, seed: int = 3) -> Result:
    """Runs mixed jobs on two workers and compares the named times of each with its total.

    The value is the largest difference, as a share of the allowed 2 % or 5 ms.
    """
    rng = random.Random(seed)
    async with fleet_of(costs, 2) as fleet:
        gate = asyncio.Semaphore(24)

        async def one() -> Times:
            async with gate:
                return await fleet.run(
                    rng.choice(TENANTS),
                    rng.choice((1, 2, 4, 8)),
                    rng.choice((256, 256, 512)),
                    samples=rng.choice((1, 1, 1, 2)),
                    preview_interval_steps=rng.choice((0, 0, 2)),
                    lane=rng.choice((job_pb2.LANE_REALTIME, job_pb2.LANE_BATCH)),
                )

        done = await asyncio.gather(*(one() for _ in range(jobs)))
    shares = [unnamed_share(each.timings) for each in done]
    worst = done[shares.index(max(shares))]
    detail = ", ".join(
        f"{field.name} {value.ToMilliseconds()}"
        for field, value in worst.timings.ListFields()
        if field.message_type
    )
    return Result(
        f"time of {jobs} jobs in no stage, of the allowed 2 % or 5 ms", max(shares), 1.0, detail
    )


Scenario = Callable[[Costs], Awaitable[Result]]
SCENARIOS: dict[str, Scenario] = {
    "equal": equal_jobs,
    "join": joining_worker,
    "more": more_workers,
    "tenants-1": lambda costs: short_behind_long(costs, workers=1),
    "tenants-2": lambda costs: short_behind_long(costs, workers=2),
    "realtime": realtime_behind_batch,
    "stages": stages_add_up,
    "drawn-1": lambda costs: drawn_load(costs, 1),
    "drawn-2": lambda costs: drawn_load(costs, 2),
}
