"""A worker that must stop does so in time and loses no job, whatever hangs or fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_server.errors import UnavailableError
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.stack import Api, kinds, running_api, running_worker, settings, spec

NO_TIME = settings(drain_seconds=0.0)
SAME = spec(strength=1.0, output_format=job_pb2.IMAGE_FORMAT_PNG)


class HangingStore(MemoryBlobStore):
    """A store whose puts never return."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        self.asked.set()
        await asyncio.Event().wait()


async def image(api: Api) -> str:
    """Returns the image of the job in an undisturbed run."""
    messages = [message async for message in api.generate(SAME)]
    return str(messages[-1].event.succeeded.job.samples[0].sha256)


async def finished_elsewhere(bus: Bus, api: Api, name: str) -> tuple[str, job_pb2.Job]:
    """Starts another worker. Returns the last event of the job's stream, and the job."""
    async with running_worker(bus, name="heir"):
        messages = [message async for message in api.watch(name)]
    return kinds(messages)[-1], messages[-1].event.succeeded.job


async def test_an_upload_that_hangs_is_cut_short_after_the_drain_and_done_again_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.worker.worker.HAND_BACK_SECONDS", 0.1)
    bus = memory_bus(ack_wait_seconds=60.0)  # seconds; too long for the test to wait
    store = HangingStore()
    async with running_api(bus) as api:
        async with running_worker(bus):
            calm = await image(api)
        async with running_worker(bus, blobs=store, config=NO_TIME) as worker:
            job = await api.create(SAME)
            await store.asked.wait()
            async with asyncio.timeout(30):
                await worker.drained()
        end, job = await finished_elsewhere(bus, api, job.name)
    assert (end, job.worker, job.attempt) == ("succeeded", "heir", 2)
    assert job.samples[0].sha256 == calm


async def test_a_step_that_hangs_does_not_hold_up_a_worker_that_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.worker.worker.HAND_BACK_SECONDS", 0.1)
    # A thread of the engine is in the driver.
    monkeypatch.setattr(FakeEngine, "cancel", lambda *_: None)
    monkeypatch.setattr(FakeEngine, "suspend", lambda *_: None)
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        engine = FakeEngine(hold_after=1)
        async with running_worker(bus, engine, config=NO_TIME) as worker:
            job = await api.create(SAME)
            await step_of(api, job.name)
            async with asyncio.timeout(30):
                await worker.drained()
        end, job = await finished_elsewhere(bus, api, job.name)
    assert (end, job.worker) == ("succeeded", "heir")


async def step_of(api: Api, name: str) -> None:
    async for message in api.watch(name):
        if message.event.HasField("step"):
            return


async def test_a_lost_device_ends_the_worker_and_its_jobs_go_on_elsewhere() -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        async with running_worker(bus):
            calm = await image(api)
        engine = FakeEngine(hold_after=2)
        job = await api.create(SAME)
        await lost_in_its_step(bus, api, engine, job.name, 1)
        assert await bus.workers.workers() == []
        end, job = await finished_elsewhere(bus, api, job.name)
    assert (end, job.worker, job.attempt) == ("succeeded", "heir", 2)
    assert job.samples[0].sha256 == calm


async def test_a_job_that_breaks_every_device_fails_after_its_attempts() -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    config = settings(max_attempts=2)
    async with running_api(bus) as api:
        async with running_worker(bus):  # This makes the model known to the api.
            await image(api)
        job = await api.create(SAME)
        for attempt in range(2):
            engine = FakeEngine(hold_after=1)
            await lost_in_its_step(bus, api, engine, job.name, attempt + 1, config=config)
        async with running_worker(bus, name="last", config=config):
            messages = [message async for message in api.watch(job.name)]
    assert messages[-1].event.failed.job.error.reason == "ATTEMPTS_EXHAUSTED"


async def lost_in_its_step(
    bus: Bus, api: Api, engine: FakeEngine, name: str, attempt: int, **changes: Any
) -> None:
    """Starts a worker, which takes the job, loses its device in a step and exits."""

    async def work() -> None:
        async with running_worker(bus, engine, name=f"w{attempt}", **changes) as worker:
            await attempt_of(api, name, attempt)
            engine.lose_device()
            await worker.task

    async with asyncio.timeout(30):
        with pytest.raises(UnavailableError, match="the device is lost"):
            await work()
    await asyncio.to_thread(engine.stop)


async def attempt_of(api: Api, name: str, attempt: int) -> None:
    """Waits for a step of this attempt."""
    now = 0
    async for message in api.watch(name):
        if message.event.HasField("started"):
            now = message.event.started.attempt
        if message.event.HasField("step") and now == attempt:
            return


async def test_a_cancel_whose_word_was_lost_is_read_from_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = memory_bus(ack_wait_seconds=0.3)

    async def ignore(_: int) -> None:
        """Ignores the errors of the worker, whose connection is lost."""

    monkeypatch.setattr(bus.control, "cancel", ignore)
    engine = FakeEngine(hold_after=1)
    async with running_api(bus) as api, running_worker(bus, engine):
        job = await api.create(SAME)
        await step_of(api, job.name)
        await api.cancel(job.name)
        async with asyncio.timeout(30):
            messages = [message async for message in api.watch(job.name)]
    assert kinds(messages)[-1] == "cancelled"
