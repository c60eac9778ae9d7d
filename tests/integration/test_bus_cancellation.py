"""Calls that are cancelled or overlap do not damage the shared connection."""

import asyncio
from pathlib import Path
from typing import Any

from img2img_server.devstack import LocalServers
from img2img_server.domain.events import Queued
from img2img_server.nats.bus import connect_bus
from img2img_server.nats.connection import connect
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
                async with asyncio.timeout(30):
                    assert await bus.jobs.get("dev", 10_000_001) is None


async def test_a_flush_comes_after_the_commands_before_it(engines: LocalServers) -> None:
    async with connect([engines.nats_url]) as link:
        transport, written = link.nc._transport, list[bytes]()
        assert transport
        write, write_lines = transport.write, transport.writelines

        def note(data: bytes) -> Any:
            written.append(data)
            return write(data)

        def note_lines(lines: list[bytes]) -> Any:
            written.extend(lines)
            return write_lines(lines)

        transport.write, transport.writelines = note, note_lines  # type: ignore[method-assign]
        await link.nc.subscribe("news")
        await link.nc.flush(timeout=30)
    sent = b"".join(written)
    assert 0 <= sent.find(b"SUB news") < sent.find(b"PING")
