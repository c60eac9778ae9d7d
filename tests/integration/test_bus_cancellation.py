"""Callers that are cancelled in the middle of a call do not damage the shared connection."""

import asyncio
from pathlib import Path

from img2img_server.devstack import LocalServers
from img2img_server.domain.events import Queued
from img2img_server.nats.bus import connect_bus
from tests.stack import settings


async def test_cancelled_watches_leave_the_connection_alive(tmp_path: Path) -> None:
    async with LocalServers(tmp_path) as engines:  # noqa: SIM117  the second needs the first
        async with connect_bus(settings(nats_url=engines.nats_url)) as bus:
            writer = await bus.events.open(1, fresh=True)
            await writer.append(Queued())

            async def watch() -> None:
                async with bus.events.watch(1) as log:
                    async for _ in log:
                        pass

            for turn in range(60):
                task = asyncio.create_task(watch())
                for _ in range(turn):
                    # The cancel comes at each moment of entering, reading and leaving.
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                async with asyncio.timeout(1.0):
                    assert await bus.jobs.get("dev", 10_000_001) is None
