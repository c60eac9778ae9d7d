"""The limit of a tenant's unfinished jobs holds over models and lanes, at several apis."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from fixtures_engines import QUEUE_LIMIT, OpenBus

from img2img.v1 import job_pb2
from img2img_server.api.quota import Quota
from img2img_server.domain.job import State
from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError
from img2img_server.interfaces.queue import QueuedJob
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.stack import (
    WAIT_SECONDS,
    Api,
    known_model,
    photo,
    running_api,
    running_worker,
    settings,
    spec,
)

TENANT = "dev"
LANES = (job_pb2.LANE_REALTIME, job_pb2.LANE_BATCH)


async def gives_all_back(bus: Bus) -> None:
    """Returns once the tenant has neither permits nor messages."""
    async with asyncio.timeout(WAIT_SECONDS):
        while await bus.permits.count(TENANT) or await bus.queue.unfinished(TENANT):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def two_apis(open_bus: OpenBus) -> AsyncIterator[tuple[list[Api], Bus]]:
    config = settings(queue_limit=QUEUE_LIMIT)
    async with open_bus() as one, open_bus() as two:
        await known_model(one)
        async with running_api(one, config) as first, running_api(two, config) as second:
            yield [first, second], one


async def test_jobs_of_two_lanes_created_at_once_at_two_apis_keep_the_limit(
    open_bus: OpenBus,
) -> None:
    async with two_apis(open_bus) as (apis, bus):
        creating = [
            api.create(spec(lane=lane, seed=seed), request_id=str(uuid.uuid4()))
            for seed in range(3)
            for api in apis
            for lane in LANES
        ]
        results = await asyncio.gather(*creating, return_exceptions=True)
        jobs = [result for result in results if isinstance(result, job_pb2.Job)]
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert len(jobs) == QUEUE_LIMIT
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert await bus.queue.unfinished(TENANT) == QUEUE_LIMIT
        assert await bus.permits.count(TENANT) == QUEUE_LIMIT
        await apis[0].cancel(jobs[0].name)
        await apis[1].create(spec())


async def test_permits_at_once_from_two_connections_are_bounded(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as two:
        taking = [bus.permits.take(TENANT, n) for n in range(6) for bus in (one, two)]
        results = await asyncio.gather(*taking, return_exceptions=True)
        permits = [result for result in results if isinstance(result, int)]
        assert len(set(permits)) == QUEUE_LIMIT
        assert all(isinstance(r, int | QueueFullError) for r in results)
        assert [permit for permit, _ in await two.permits.oldest(TENANT, 9)] == sorted(permits)
        assert len(await two.permits.oldest(TENANT, 2)) == 2
        await one.permits.release(permits[0])
        await one.permits.release(permits[0])
        assert await two.permits.count(TENANT) == QUEUE_LIMIT - 1
        assert await two.permits.count("dev.other") == 0
        assert await two.permits.take(TENANT, 7) not in permits


async def test_permits_of_dead_processes_are_released_when_the_limit_is_reached(
    open_bus: OpenBus,
) -> None:
    async with two_apis(open_bus) as (apis, bus):
        job = await apis[0].create(spec())
        for _ in range(QUEUE_LIMIT - 1):  # The processes died before they created a record.
            await bus.permits.take(TENANT, await bus.jobs.next_id(TENANT))
        waiting = Quota(bus, limit=QUEUE_LIMIT, abandon_seconds=60.0)
        assert await waiting.unfinished(TENANT) == QUEUE_LIMIT
        searching = Quota(bus, limit=QUEUE_LIMIT, abandon_seconds=0.0)
        assert await searching.unfinished(TENANT) == 1
        ((permit, job_id),) = await bus.permits.oldest(TENANT, 9)
        assert job_id == job.id
        stored = await bus.jobs.get(TENANT, job_id)
        assert stored is not None
        assert stored.job.permit == permit


async def test_jobs_that_end_give_their_permits_back() -> None:
    bus = memory_bus()
    async with running_worker(bus, FakeEngine(hold_after=1)) as worker, running_api(bus) as api:
        first, second = await api.create(spec()), await api.create(spec(seed=2))
        await api.reaches(first.name, job_pb2.Job.STATE_RUNNING)
        assert await bus.permits.count(TENANT) == 2
        worker.engine.release()
        await api.reaches(first.name, job_pb2.Job.STATE_SUCCEEDED)
        await api.reaches(second.name, job_pb2.Job.STATE_SUCCEEDED)
        await gives_all_back(bus)


async def test_a_worker_drops_the_message_of_an_abandoned_record() -> None:
    # The job's own message is delivered again after this time.
    bus = memory_bus(ack_wait_seconds=0.5)
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        stale = QueuedJob(job_id=job.id, tenant=TENANT, init_image=photo(), permit=99)
        await bus.queue.put(stale, FAKE_MODEL.name, Lane.REALTIME)
        async with running_worker(bus):
            await api.reaches(job.name, job_pb2.Job.STATE_SUCCEEDED)
            await gives_all_back(bus)
        stored = await bus.jobs.get(TENANT, job.id)
        assert stored is not None
        assert (stored.job.state, stored.job.attempt) == (State.SUCCEEDED, 1)


async def test_a_job_that_was_not_accepted_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        queued, goes_on = asyncio.Event(), asyncio.Event()
        put = bus.queue.put

        async def slow_put(*args: object) -> int:
            queued.set()
            await goes_on.wait()
            return await put(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(bus.queue, "put", slow_put)
        creating = asyncio.create_task(api.create(spec()))
        await queued.wait()
        (drawn,) = await bus.jobs.list_ids(TENANT)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await api.get(f"jobs/{drawn}")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        goes_on.set()
        assert (await api.get((await creating).name)).id == drawn
