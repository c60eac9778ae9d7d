"""Space for event logs on JetStream: shares of tenants, and retention after the end of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from img2img_server import clock
from img2img_server.domain.events import EncodedImage, SampleFinished, Started, Succeeded
from img2img_server.nats import subjects
from img2img_server.nats.access import NatsAccess
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.nats.connection import NatsConnection, connect
from img2img_server.settings import Settings

JOB = 10_000_001
MAX_BYTES = 2**21
SIZE = 100_000
IMAGE = EncodedImage(data=b"x" * SIZE, media_type="image/png", sha256="a" * 64, width=8, height=8)
STARTED = Started(worker="w", model="m", attempt=1)


async def write(bus: Bus, tenant: str, job_id: int, *, ended: bool = True) -> None:
    writer = await bus.events.open(job_id, tenant=tenant, fresh=True)
    await writer.append(STARTED)
    await writer.append(SampleFinished(sample=0, seed=1, image=IMAGE))
    if ended:
        await writer.append(Succeeded())


async def logged(bus: Bus, job_id: int) -> int:
    return await bus.events.last_sequence(job_id)


async def stored_bytes(link: NatsConnection) -> int:
    return (await link.js.stream_info(subjects.EVENTS)).state.bytes


async def test_a_tenant_removes_only_its_own_logs_and_never_those_of_running_jobs(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings(events_max_bytes=MAX_BYTES)
    async with connect_bus(config) as bus, connect(NatsAccess.from_settings(config)) as link:
        await write(bus, "beta", JOB)
        await write(bus, "alpha", JOB + 1, ended=False)
        alpha = range(JOB + 2, JOB + 62)
        for job_id in alpha:
            await write(bus, "alpha", job_id)
        assert await logged(bus, JOB) == 3
        assert await logged(bus, JOB + 1) == 2
        kept = [job_id for job_id in alpha if await logged(bus, job_id)]
        assert kept == list(alpha)[-len(kept) :]
        assert MAX_BYTES * 0.3 < len(kept) * SIZE < MAX_BYTES * 0.6
        # A tenant that comes later has place although the first one uses its whole share.
        for job_id in range(JOB + 100, JOB + 110):
            await write(bus, "gamma", job_id)
        assert await logged(bus, JOB) == 3
        assert [job_id for job_id in kept if not await logged(bus, job_id)] == []
        assert sum([bool(await logged(bus, each)) for each in range(JOB + 100, JOB + 110)]) >= 3
        assert await stored_bytes(link) < MAX_BYTES
        entries = (await link.js.stream_info(subjects.EVENT_USE)).state.messages
        ended = [JOB, *alpha, *range(JOB + 100, JOB + 110)]
        assert entries == sum([bool(await logged(bus, job_id)) for job_id in ended])


async def test_the_log_that_ended_last_stays_although_it_is_larger_than_the_share(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings(events_max_bytes=MAX_BYTES)
    async with connect_bus(config) as bus:
        writer = await bus.events.open(JOB, tenant="alpha", fresh=True)
        for _ in range(15):
            await writer.append(SampleFinished(sample=0, seed=1, image=IMAGE))
        await writer.append(Succeeded())
        assert await logged(bus, JOB) == 16


async def test_a_log_is_kept_until_its_retention_after_the_end_of_the_job(
    engine_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_settings(events_retention_seconds=60.0)
    async with connect_bus(config) as bus, connect(NatsAccess.from_settings(config)) as link:
        await write(bus, "alpha", JOB)
        await write(bus, "alpha", JOB + 1, ended=False)
        now = clock.now
        monkeypatch.setattr(clock, "now", lambda: now() + 50.0)
        await write(bus, "beta", JOB + 2)
        await bus.events.remove_expired()
        assert [await logged(bus, JOB + n) for n in range(3)] == [3, 2, 3]
        monkeypatch.setattr(clock, "now", lambda: now() + 100.0)
        await bus.events.remove_expired()
        assert [await logged(bus, JOB + n) for n in range(3)] == [0, 2, 3]
        monkeypatch.setattr(clock, "now", lambda: now() + 200.0)
        await bus.events.remove_expired()
        assert [await logged(bus, JOB + n) for n in range(3)] == [0, 2, 0]
        assert (await link.js.stream_info(subjects.EVENT_USE)).state.messages == 0
        # NATS itself does not remove the events of a job that waits or runs for a long time.
        info = await link.js.stream_info(subjects.EVENTS)
        assert (info.config.max_age or 0.0) > 24 * 3600.0


async def test_writers_of_one_tenant_account_for_their_logs_at_the_same_time(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings()
    async with connect_bus(config) as bus, connect(NatsAccess.from_settings(config)) as link:
        await asyncio.gather(*(write(bus, "alpha", JOB + number) for number in range(12)))
        info = await link.js.stream_info(subjects.EVENT_USE)
        assert info.state.messages == 12
