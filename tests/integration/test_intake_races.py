"""One request_id makes one job, in every interleaving of calls at several apis and with faults."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AsyncExitStack

from img2img_server.nats.bus import connect_bus
from img2img_server.settings import Settings
from img2img_server.testing.bus import memory_bus
from tests import intake_races

# `make races` runs the numbers of the target.
MEMORY_RACES = int(os.environ.get("MEMORY_RACES", "250"))
JETSTREAM_RACES = int(os.environ.get("JETSTREAM_RACES", "3"))
FIRST_SEED = int(os.environ.get("FIRST_SEED", "0"))


async def test_races_in_memory_make_one_job_each() -> None:
    answers = 0
    for seed in range(FIRST_SEED, FIRST_SEED + MEMORY_RACES):
        bus = memory_bus(queue_limit=intake_races.LIMIT)
        done = await intake_races.race([bus, bus], seed)
        answers += sum(answer != "error" for _, answer in done.reports)
    assert answers > MEMORY_RACES  # Not every call failed.


async def test_races_on_jetstream_make_one_job_each(
    engine_settings: Callable[..., Settings],
) -> None:
    settings = engine_settings(queue_limit=intake_races.LIMIT)
    async with AsyncExitStack() as open_buses:
        buses = [await open_buses.enter_async_context(connect_bus(settings)) for _ in range(3)]
        for seed in range(FIRST_SEED, FIRST_SEED + JETSTREAM_RACES):
            await intake_races.race(buses, seed, pull_seconds=0.05)
