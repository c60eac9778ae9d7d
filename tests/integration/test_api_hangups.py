"""Callers that disconnect, servers that die during a call and components that fail: no job is left
unfinished.
"""

import asyncio
import dataclasses
import uuid
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, job_pb2, service_pb2
from img2img_server.domain.params import Lane
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.records import UnreadableError
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.stack import (
    DEV,
    kinds,
    known_model,
    refusal,
    running_api,
    running_worker,
    settings,
    spec,
)


class Through:
    """A proxy of an object; subclasses replace single methods."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class GatedQueue(Through):
    """A queue that keeps new jobs waiting until it is opened."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.reached, self.open = asyncio.Event(), asyncio.Event()

    async def put(self, *job: Any) -> int:
        self.reached.set()
        await self.open.wait()
        return int(await self.inner.put(*job))


@pytest.mark.parametrize(
    ("detach", "state"),
    [(False, job_pb2.Job.STATE_CANCELLED), (True, job_pb2.Job.STATE_QUEUED)],
)
async def test_a_caller_who_leaves_while_the_job_is_made_strands_nothing(
    detach: bool, state: int
) -> None:
    bus = memory_bus()
    await known_model(bus)
    queue = GatedQueue(bus.queue)
    config = settings(disconnect_grace_seconds=0.05)
    async with running_api(dataclasses.replace(bus, queue=queue), config) as api:
        request_id = str(uuid.uuid4())
        call = api.generate(spec(), request_id=request_id, detach=detach)
        reading = asyncio.create_task(call.read())
        await queue.reached.wait()
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        queue.open.set()
        (job_id,) = await bus.jobs.list_ids("dev")
        job = await api.reaches(f"jobs/{job_id}", state)
        assert await bus.queue.depth("fake", Lane.REALTIME) == (1 if detach else 0)
        again = await api.create(spec(), request_id=request_id)
        assert again.id == job.id


async def test_a_request_repeated_after_its_api_died_half_way_is_finished() -> None:
    bus = memory_bus()
    await known_model(bus)
    request_id = str(uuid.uuid4())
    queue = GatedQueue(bus.queue)
    async with running_api(dataclasses.replace(bus, queue=queue)) as doomed:
        dying = asyncio.create_task(doomed.create(spec(), request_id=request_id))
        # The api dies after it has created the record and claimed the request_id, and before it
        # queues the job.
        await queue.reached.wait()
        async with running_api(bus) as api, running_worker(bus, name="w2"):
            messages = [m async for m in api.generate(spec(), request_id=request_id)]
            assert kinds(messages)[-1] == "succeeded"
            assert await bus.jobs.list_ids("dev") == [messages[-1].event.succeeded.job.id]
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        queue.open.set()


async def test_too_many_watchers_are_refused_before_there_is_a_job() -> None:
    bus = memory_bus()
    engine = FakeEngine(hold_after=1)
    async with running_worker(bus, engine), running_api(bus, settings(max_watchers=1)) as api:
        call = api.generate(spec(strength=1.0))
        stream = aiter(call)
        await anext(stream)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.generate(spec()).read()
        assert refusal(caught.value).reason == "TOO_MANY_WATCHERS"
        assert len(await bus.jobs.list_ids("dev")) == 1
        engine.release()
        assert kinds([m async for m in stream])[-1] == "succeeded"


async def test_of_two_streams_of_one_request_the_first_may_leave() -> None:
    bus = memory_bus()
    engine = FakeEngine(hold_after=1)
    async with running_worker(bus, engine), running_api(bus) as api:
        request_id = str(uuid.uuid4())
        first = api.generate(spec(strength=1.0), request_id=request_id)
        await first.read()
        second = aiter(api.generate(spec(strength=1.0), request_id=request_id))
        messages = [await anext(second)]
        first.cancel()
        engine.release()
        messages += [m async for m in second]
        assert kinds(messages)[-1] == "succeeded"


class ForgetfulEvents(Through):
    """An event log whose first writer cannot append."""

    failures = 1

    async def open(self, job_id: int, **options: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise UnavailableError
        return await self.inner.open(job_id, **options)


async def test_a_cancel_that_broke_off_is_completed_by_the_next() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
    async with running_api(dataclasses.replace(bus, events=ForgetfulEvents(bus.events))) as api:
        with pytest.raises(grpc.aio.AioRpcError):
            await api.cancel(job.name)
        assert (await api.cancel(job.name)).state == job_pb2.Job.STATE_CANCELLED
        assert (await bus.events.open(job.id)).ended


REQUEST = "0c2ad4d2-9b7d-4c6e-8f4c-6d0c9a6a3a11"


class UnreadableJobs(Through):
    """A store in which one record cannot be decoded."""

    unreadable = 0

    async def get(self, tenant: str, job_id: int) -> Any:
        if job_id == self.unreadable:
            raise UnreadableError("this record makes no sense")
        return await self.inner.get(tenant, job_id)

    async def latest(self, tenant: str, job_id: int) -> Any:
        if job_id == self.unreadable:
            raise UnreadableError("this record makes no sense")
        return await self.inner.latest(tenant, job_id)


async def test_a_record_that_cannot_be_read_kills_no_worker_and_goes_to_the_dead_letters() -> None:
    bus = memory_bus(ack_wait_seconds=0.2)
    jobs = UnreadableJobs(bus.jobs)
    await known_model(bus)
    async with running_api(bus) as api:
        bad = await api.create(spec())
        jobs.unreadable = bad.id
        broken = dataclasses.replace(bus, jobs=jobs)
        async with running_worker(broken, name="w2", config=settings(max_attempts=2)):
            good = [m async for m in api.generate(spec())]
            assert kinds(good)[-1] == "succeeded"
            async with asyncio.timeout(30):
                while not bus.queue.dead:  # type: ignore[attr-defined]  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            assert [job.job_id for job, _ in bus.queue.dead] == [bad.id]  # type: ignore[attr-defined]


async def test_a_record_that_cannot_be_read_hides_no_other_from_lists_and_clear_queue() -> None:
    bus = memory_bus()
    jobs = UnreadableJobs(bus.jobs)
    await known_model(bus)
    async with running_api(dataclasses.replace(bus, jobs=jobs)) as api:
        first, bad, last = [await api.create(spec()) for _ in range(3)]
        jobs.unreadable = bad.id
        with capture_logs() as logs:
            listed = await api.stub.ListJobs(service_pb2.ListJobsRequest(), metadata=DEV)
        assert [job.name for job in listed.jobs] == [last.name, first.name]
        assert [line["job"] for line in logs if line["log_level"] == "warning"] == [bad.id]
        admin = admin_service_pb2_grpc.AdminServiceStub(api.channel)
        request = admin_service_pb2.ClearQueueRequest()
        assert (await admin.ClearQueue(request, metadata=DEV)).cleared_jobs == 2


async def test_a_record_that_cannot_be_read_is_the_services_trouble_for_now_and_no_fault() -> None:
    bus = memory_bus()
    jobs = UnreadableJobs(bus.jobs)
    await known_model(bus)
    async with running_api(dataclasses.replace(bus, jobs=jobs)) as api:
        bad = await api.create(spec(), request_id=REQUEST)
        jobs.unreadable = bad.id
        redeliver = service_pb2.RedeliverWebhookRequest(name=bad.name)
        for call in (
            api.create(spec(), request_id=REQUEST),
            api.get(bad.name),
            api.watch(bad.name).read(),
            api.cancel(bad.name),
            api.stub.RedeliverWebhook(redeliver, metadata=DEV),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            found = refusal(caught.value)
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            assert caught.value.details() == "The job's record cannot be read by this server."
        jobs.unreadable = 0  # Another api can decode the record.
        assert (await api.cancel(bad.name)).state == job_pb2.Job.STATE_CANCELLED


async def test_the_models_own_limits_and_strength_are_checked_by_the_api() -> None:
    bus = memory_bus()
    model = dataclasses.replace(FAKE_MODEL, max_num_inference_steps=50, default_strength=0.4)
    async with running_worker(bus, FakeEngine(model)), running_api(bus) as api:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec(num_inference_steps=51))
        assert refusal(caught.value).violations == {
            "num_inference_steps": "num_inference_steps must be between 1 and 50"
        }
        assert (await api.create(spec())).spec.strength == 0.4
        assert (await api.create(spec(strength=0.9))).spec.strength == 0.9


async def test_the_first_event_tells_the_place_in_the_queue() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        jobs = [await api.create(spec()) for _ in range(3)]
        for place, job in enumerate(jobs):
            call = api.watch(job.name)
            messages = [await call.read() for _ in range(2)]
            assert messages[1].event.queued.position == place
            call.cancel()
