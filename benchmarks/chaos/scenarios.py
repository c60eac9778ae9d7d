"""The faults to inject, under load. Each scenario has a long and a short form."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.load import LONG_STEPS, Damage, Load, open_client
from benchmarks.chaos.service import Service, running_service
from img2img_client import AsyncClient
from img2img_server.nats import subjects
from tests.nats_cluster import nats_cluster

HOUR = 3600.0
# The least share of the steps before an outage that must run in an equal time of the outage.
LEAST_STEPS = 0.5


@dataclass(frozen=True)
class Scenario:
    """Injects faults under load. `run(service, load, short)` returns their number and the damage.

    `has_cluster`: NATS is a cluster, which only the long form has.
    """

    name: str
    run: Callable[[Service, Load, bool], Awaitable[tuple[int, Damage]]]
    has_cluster: bool = False


@asynccontextmanager
async def ready(folder: Path, *, has_cluster: bool = False) -> AsyncIterator[tuple[Service, Load]]:
    """Yields a running service, and a load whose expected images are known."""
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240
    if has_cluster:
        async with (
            nats_cluster(folder / "nats") as cluster,
            running_service(folder, cluster.url, IMG2IMG_NATS_REPLICAS="3") as service,
            open_client(service) as client,
        ):
            service.cluster = cluster
            yield service, await _calm(service, client)
    else:
        async with running_service(folder) as service, open_client(service) as client:
            yield service, await _calm(service, client)


async def _calm(service: Service, client: AsyncClient) -> Load:
    load = Load(service, client)
    await load.calm()
    return load


@asynccontextmanager
async def steady(load: Load, jobs_a_second: float) -> AsyncIterator[None]:
    """Sends jobs at this rate while the context is open, then waits for their ends."""
    over = asyncio.Event()
    sending = asyncio.create_task(load.steady(jobs_a_second, over))
    try:
        yield
    finally:
        over.set()
        await sending
    await load.ended()


async def killed_workers(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Kills workers while they run jobs."""
    kills, jobs = (4, 5) if short else (50, 4)
    draw = random.Random(1)
    for _ in range(kills):
        for _ in range(jobs):
            load.send()
        await asyncio.sleep(draw.uniform(0.2, 0.8))
        worker = draw.choice(service.workers)
        await worker.kill()
        await worker.start()
    await load.ended()
    return kills, await load.damage(loses_workers=True)


async def stopped_workers(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Stops workers with SIGTERM while they run long jobs, which idle workers continue."""
    stops, jobs = 3 if short else 20, 4
    draw = random.Random(3)
    for _ in range(stops):
        moving = load.send(steps=LONG_STEPS)
        for _ in range(jobs - 1):
            load.send()
        await asyncio.sleep(draw.uniform(0.2, 0.8))
        await moving.has_started.wait()
        if moving.starts:  # Otherwise it counts as lost.
            worker = service.worker(moving.starts[-1].worker)
            await worker.stop()
            await worker.start()
    await load.ended()
    damage = await load.damage(loses_workers=False)
    damage.wasted += load.repeated_steps(damage)
    if not load.moved_jobs():
        damage.faults.append("no job was moved with its state")
    return stops, damage


async def nats_away(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Kills the only NATS server and starts it again later."""
    pauses, calm = ((3.0,), 0.5) if short else ((2.0, 8.0, 20.0), 4.0)
    assert service.nats is not None
    async with steady(load, 3.0):
        for pause in pauses:
            await asyncio.sleep(calm)
            await service.nats.away(pause)
            await asyncio.sleep(calm)
    # A worker that cannot reach NATS for longer than ack_wait loses its jobs.
    return len(pauses), await load.damage(loses_workers=True)


async def lost_leaders(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Kills and freezes leaders of a cluster of three NATS servers."""
    cluster, faults = service.cluster, ("kill", "freeze", "kill", "freeze")
    assert cluster is not None
    async with steady(load, 3.0):
        for fault in faults:
            await asyncio.sleep(4.0)
            leader = await cluster.leader(subjects.JOBS)
            if fault == "freeze":
                cluster.freeze(leader)
                await asyncio.sleep(20.0)
            await cluster.kill(leader)
            await asyncio.sleep(4.0)
            await cluster.start(leader)
            await asyncio.sleep(4.0)
    return len(faults), await load.damage(loses_workers=True)


async def restarted_apis(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Kills and stops both apis while callers watch."""
    watchers, rounds = (20, 1) if short else (100, 3)
    injected = 0
    one, other = service.apis
    for _ in range(rounds):
        for _ in range(watchers):
            load.send()
        await one.kill()
        await one.start()
        for _ in range(watchers):
            load.send()
        if await other.stop() != 0:
            raise RuntimeError("an api did not stop cleanly")
        await other.start()
        one, other = other, one
        injected += 2
    if not short:
        await asyncio.gather(*(api.kill() for api in service.apis))
        await asyncio.sleep(4.0)
        await asyncio.gather(*(api.start() for api in service.apis))
        injected += 2
    await load.ended()
    return injected, await load.damage()


async def store_away(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Kills the S3 server and starts it again later. Images wait, and steps continue."""
    return await _with_store(service.store.away, load, short)


async def store_frozen(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Stops the S3 server from responding. Images wait, and steps continue."""
    return await _with_store(service.store.frozen, load, short)


async def _with_store(
    fault: Callable[[float], Awaitable[None]], load: Load, short: bool
) -> tuple[int, Damage]:
    seconds, calm = (4.0, 2.0) if short else (60.0, 10.0)
    async with steady(load, 4.0):
        before = time.monotonic()
        await asyncio.sleep(calm)
        start = time.monotonic()
        await fault(seconds)
    damage = await load.damage()
    rate = load.steps_between(before, start) / (start - before)
    during = load.steps_between(start, start + seconds) / seconds
    if during < LEAST_STEPS * rate:
        damage.faults.append(f"{during:.0f} steps a second in the outage, {rate:.0f} before")
    return 1, damage


async def wrong_clocks(service: Service, load: Load, short: bool) -> tuple[int, Damage]:
    """Starts an api with a wrong clock and steps the clock of a worker, which S3 then refuses."""
    offsets = (HOUR,) if short else (HOUR, -HOUR, 25 * HOUR)
    api, worker = service.apis[0], service.workers[0]
    for offset in offsets:
        await asyncio.gather(api.stop(), worker.stop())
        await asyncio.gather(
            api.start(CHAOS_CLOCK_SECONDS=str(offset)), worker.start(CHAOS_CLOCK_STEP=str(offset))
        )
        worker.signal(signal.SIGUSR1)
        for _ in range(15 if short else 40):
            load.send()
        await load.ended()
    damage = await load.damage()
    for role in (api, worker):
        if "clock_skew" not in role.log:
            damage.faults.append(f"no line clock_skew in the log of the {role.kind}")
    await asyncio.gather(api.stop(), worker.stop())
    await asyncio.gather(api.start(), worker.start())
    return 2 * len(offsets), damage


ALL = (
    Scenario("workers killed", killed_workers),
    Scenario("workers stopped", stopped_workers),
    Scenario("apis killed and stopped", restarted_apis),
    Scenario("S3 away", store_away),
    Scenario("S3 frozen", store_frozen),
    Scenario("NATS away", nats_away),
    Scenario("NATS leaders killed and frozen", lost_leaders, has_cluster=True),
    Scenario("clocks wrong", wrong_clocks),
)
