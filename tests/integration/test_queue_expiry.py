"""Jobs that no worker completes within the retention end with a reason."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_server.api.cancel import Canceller
from img2img_server.api.expiry import QueueExpiry
from img2img_server.domain.models import WorkerInfo
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL
from tests.stack import read_until, running_api, running_worker, settings, spec


def expiry(bus: Bus, hours: int = 0) -> QueueExpiry:
    return QueueExpiry(bus.queue, Canceller(bus), hours)


async def test_a_job_that_no_worker_starts_fails_after_the_retention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.api.expiry.INTERVAL_SECONDS", 0.02)
    bus = memory_bus()
    await bus.workers.announce(WorkerInfo(name="w", model=FAKE_MODEL, device="cpu"))
    await bus.workers.withdraw("w")
    config = settings().model_copy(update={"retention_hours": 0})
    async with running_api(bus, config) as api:
        job = await api.create(spec())
        *_, end = await read_until(api.watch(job.name), "failed")
        error = end.event.failed.job.error
        assert (error.reason, error.retryable) == ("QUEUE_EXPIRED", True)
        async with asyncio.timeout(10):
            while await bus.permits.count("dev"):  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.005)
        assert await bus.queue.unfinished("dev") == 0
        assert (await api.get(job.name)).warning == ""


async def test_a_job_that_a_worker_runs_does_not_expire_until_the_worker_is_lost() -> None:
    bus = memory_bus()
    async with running_api(bus) as api:
        async with running_worker(bus) as worker:
            job = await api.create(spec(prompt="hold: it", strength=1.0))
            await read_until(api.watch(job.name), "step")
            assert await expiry(bus).end_expired() == 0
            worker.task.cancel()
            await asyncio.wait({worker.task})
        await bus.workers.withdraw("w1")
        assert await expiry(bus, hours=1).end_expired() == 0
        assert await expiry(bus).end_expired() == 1
        ended = await api.get(job.name)
        assert ended.state == job_pb2.Job.STATE_FAILED
        assert ended.error.reason == "QUEUE_EXPIRED"


async def test_an_end_that_a_stopping_api_interrupted_is_finished_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = memory_bus()
    await bus.workers.announce(WorkerInfo(name="w", model=FAKE_MODEL, device="cpu"))
    await bus.workers.withdraw("w")
    async with running_api(bus) as api:
        job = await api.create(spec(webhook="https://203.0.113.1/hook"))
        put, reached, queued = bus.outbox.put, asyncio.Event(), []

        async def hang(*_: object) -> None:
            reached.set()
            await asyncio.Event().wait()

        async def count(*arguments: Any) -> None:
            queued.append(arguments)
            await put(*arguments)

        monkeypatch.setattr(bus.outbox, "put", hang)
        ending = asyncio.create_task(expiry(bus).end_expired())
        await reached.wait()
        ending.cancel()
        await asyncio.wait({ending})
        assert (await api.get(job.name)).error.reason == "QUEUE_EXPIRED"
        monkeypatch.setattr(bus.outbox, "put", count)
        for _ in range(2):
            assert await expiry(bus).end_expired() == 0
        assert len(queued) == 1
        assert await bus.queue.unfinished("dev") == 0
        assert await bus.permits.count("dev") == 0
