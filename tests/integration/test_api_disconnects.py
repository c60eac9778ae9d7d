"""Generate calls whose connections break: when their jobs continue, and when they are cancelled."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from fixtures_engines import OpenBus
from structlog.testing import capture_logs

from img2img.v1 import job_pb2, service_pb2
from img2img_server.api.records import page_of
from img2img_server.domain.job import LAST_JOB_ID, Job
from img2img_server.errors import UnavailableError
from img2img_server.telemetry import RPCS
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from tests.stack import (
    DEV,
    Api,
    kinds,
    known_model,
    photo,
    read_until,
    running_api,
    running_worker,
    settings,
    spec,
    two_tenants,
)

QUEUED, RUNNING = job_pb2.Job.STATE_QUEUED, job_pb2.Job.STATE_RUNNING
CANCELLED = job_pb2.Job.STATE_CANCELLED
GRACE_SECONDS = 0.8
ON_NATS = pytest.mark.parametrize("open_bus", ["jetstream"], indirect=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_server.api.disconnects._ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("img2img_server.api.disconnects._SUCCESSOR_SECONDS", 0.3)
    monkeypatch.setattr("img2img_server.api.disconnects._RETRY_SECONDS", 0.05)


@asynccontextmanager
async def apis(
    open_bus: OpenBus, engine: FakeEngine, count: int = 1, **changes: Any
) -> AsyncIterator[list[Api]]:
    """Yields a worker and a number of apis, each with its own connection to NATS."""
    config = settings(**({"disconnect_grace_seconds": GRACE_SECONDS} | changes))
    async with AsyncExitStack() as parts:
        bus = await parts.enter_async_context(open_bus())
        await parts.enter_async_context(running_worker(bus, engine))
        found = []
        for _ in range(count):
            bus = await parts.enter_async_context(open_bus())
            found.append(await parts.enter_async_context(running_api(bus, config)))
        yield found


async def logged(logs: list[Any], event: str, name: str = "") -> dict[str, Any]:
    """Waits for a line of the log, about the job of that name, and returns it."""
    async with asyncio.timeout(30):
        while True:
            for line in logs:
                if line["event"] == event and name in ("", f"jobs/{line.get('job')}"):
                    return dict(line)
            await asyncio.sleep(0.005)


async def broken(api: Api, logs: list[Any], **fields: Any) -> str:
    """Breaks a Generate call whose job is held after a step; returns the job's name."""
    call = api.generate(spec(strength=1.0), **fields)
    name = str((await read_until(call, "step"))[0].event.job)
    call.cancel()
    await logged(logs, "generate_disconnected", name)
    return name


async def outlive_the_grace_period(
    api: Api, *names: str, grace_seconds: float = GRACE_SECONDS
) -> None:
    """Asserts that none of the jobs is cancelled when the grace period ends."""
    await asyncio.sleep(grace_seconds + 0.3)
    for name in names:
        assert (await api.get(name)).state != CANCELLED


async def test_a_broken_call_is_cancelled_after_the_grace_period_and_the_log_says_why(
    tmp_path: Any,
) -> None:
    """The job is queued or runs, and another tenant has tried to watch it."""
    keys, key_a, key_b = two_tenants(tmp_path)
    ours, theirs = ((("authorization", f"Bearer {key}"),) for key in (key_a, key_b))
    config = settings(disconnect_grace_seconds=GRACE_SECONDS)

    async def play(state: int) -> str:
        bus, engine = memory_bus(), FakeEngine(hold_after=1)
        await known_model(bus)
        async with AsyncExitStack() as parts:
            if state == RUNNING:
                await parts.enter_async_context(running_worker(bus, engine))
            api = await parts.enter_async_context(running_api(bus, config, keys=keys))
            request = service_pb2.GenerateRequest(spec=spec(strength=1.0))
            call = api.stub.Generate(request, metadata=ours)
            first = await read_until(call, "step" if state == RUNNING else "queued")
            name = str(first[0].event.job)
            call.cancel()
            watch = service_pb2.WatchJobRequest(name=name)
            with pytest.raises(grpc.aio.AioRpcError):
                await api.stub.WatchJob(watch, metadata=theirs).read()
            await logged(logs, "generate_disconnected", name)
            await api.reaches(name, state, ours)
            await api.reaches(name, CANCELLED, ours)
            return str((await logged(logs, "job_cancelled", name))["reason"])

    with capture_logs() as logs:
        assert await asyncio.gather(play(QUEUED), play(RUNNING)) == ["disconnected"] * 2


@ON_NATS
async def test_a_stream_at_another_api_keeps_the_job(open_bus: OpenBus) -> None:
    """A WatchJob call keeps the job permanently. A repeated Generate call keeps it until that call
    breaks.
    """
    engine, request_id = FakeEngine(hold_after=1), str(uuid.uuid4())
    grace = {"disconnect_grace_seconds": 2.5}  # A loaded machine takes long to begin a watch.
    with capture_logs() as logs:
        async with apis(open_bus, engine, 2, **grace) as (first, second):
            call = first.generate(spec(strength=1.0))
            watched_before = str((await read_until(call, "step"))[0].event.job)
            open_before = second.watch(watched_before)
            await anext(aiter(open_before))
            call.cancel()  # The server detects the loss now, long after the caller.
            await logged(logs, "generate_disconnected", watched_before)
            watched = await broken(first, logs)
            watch = second.watch(watched)
            await watch.read()
            watch.cancel()
            repeated = await broken(first, logs, request_id=request_id)
            again = second.generate(spec(strength=1.0), request_id=request_id)
            await again.read()
            jobs = watched, watched_before, repeated
            await outlive_the_grace_period(first, *jobs, grace_seconds=2.5)
            again.cancel()
            await second.reaches(repeated, CANCELLED)
            engine.release()
            for stream in (open_before, second.watch(watched)):
                ended = kinds([message async for message in stream])
                assert (ended[-1], ended.count("succeeded")) == ("succeeded", 1)


@ON_NATS
async def test_another_api_cancels_the_job_when_the_first_one_stops_in_the_grace_period(
    open_bus: OpenBus,
) -> None:
    with capture_logs() as logs:
        async with apis(open_bus, FakeEngine(hold_after=1), 2) as (first, second):
            name = await broken(first, logs)
            first.stop.set()
            left = await logged(logs, "grace_periods_left_to_other_apis")
            await second.reaches(name, CANCELLED)
    assert [f"jobs/{job}" for job in left["jobs"]] == [name]


async def test_an_only_api_that_stops_in_the_grace_period_cancels_nothing() -> None:
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    config = settings(disconnect_grace_seconds=GRACE_SECONDS)
    with capture_logs() as logs:
        async with running_worker(bus, engine):
            async with running_api(bus, config) as api:
                name = await broken(api, logs)
            async with running_api(bus, config) as api:
                await outlive_the_grace_period(api, name)


async def test_a_passed_deadline_cancels_at_once_unless_detached() -> None:
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    config = settings(disconnect_grace_seconds=60.0)
    with capture_logs() as logs:
        async with running_worker(bus, engine), running_api(bus, config) as api:

            async def overrun(detach: bool) -> str:
                request = service_pb2.GenerateRequest(spec=spec(strength=1.0), detach=detach)
                call = api.stub.Generate(request, metadata=DEV, timeout=2.0)
                name = (await read_until(call, "step"))[0].event.job
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await read_until(call, "succeeded")
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                return str(name)

            detached, attached = await asyncio.gather(overrun(True), overrun(False))
            await api.reaches(attached, CANCELLED)
            assert (await api.get(detached)).state == RUNNING
    assert (await logged(logs, "job_cancelled"))["reason"] == "deadline_passed"


async def test_without_a_grace_period_a_broken_call_is_cancelled_at_once() -> None:
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    config = settings(disconnect_grace_seconds=0)
    async with running_worker(bus, engine), running_api(bus, config) as api:
        call = api.generate(spec(strength=1.0))
        name = (await read_until(call, "step"))[0].event.job
        call.cancel()
        await api.reaches(name, CANCELLED)


async def test_a_call_that_breaks_before_its_job_has_a_name_is_cancelled_at_once() -> None:
    """Without a request_id no caller can find the job again."""
    bus = memory_bus()
    await known_model(bus)
    fetching, goes_on = asyncio.Event(), asyncio.Event()

    async def fetch(_: str) -> bytes:
        fetching.set()
        await goes_on.wait()
        return photo()

    def broken_calls() -> float:
        return RPCS.labels("Generate", "CANCELLED")._value.get()

    before = broken_calls()
    config = settings(disconnect_grace_seconds=60.0)
    async with running_api(bus, config, fetch=fetch) as api:
        image = job_pb2.InitImage(url="https://example.com/cat.jpg")
        call = api.generate(spec(init_image=image))
        reading = asyncio.create_task(call.read())
        await fetching.wait()
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        async with asyncio.timeout(30):
            while broken_calls() == before:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            goes_on.set()
            jobs: list[Job] = []
            while not (jobs and jobs[0].is_accepted):
                await asyncio.sleep(0.005)
                jobs = (await page_of(bus.jobs, "dev", LAST_JOB_ID + 1, 1))[0]
        await api.reaches(jobs[0].name, CANCELLED)


async def test_a_call_that_is_closed_after_the_jobs_end_has_not_broken() -> None:
    bus = memory_bus()
    with capture_logs() as logs:
        async with running_worker(bus), running_api(bus) as api:
            call = api.generate(spec())
            await read_until(call, "succeeded")
            call.cancel()
            await api.create(spec())
    assert not [line for line in logs if line["event"] == "generate_disconnected"]


class CutOff:
    """A Control whose first cancel messages do not reach NATS."""

    def __init__(self, inner: Any, failures: int) -> None:
        self._inner, self._failures = inner, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def cancel(self, job_id: int) -> None:
        if self._failures:
            self._failures -= 1
            raise UnavailableError
        await self._inner.cancel(job_id)


async def test_the_job_is_cancelled_once_the_bus_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    config = settings(disconnect_grace_seconds=0)
    cut_off = dataclasses.replace(bus, control=CutOff(bus.control, 3))
    async with running_worker(bus, engine), running_api(cut_off, config) as api:
        call = api.generate(spec(strength=1.0))
        name = (await read_until(call, "step"))[0].event.job
        call.cancel()
        await api.reaches(name, CANCELLED)


@pytest.mark.parametrize("method", ["generate", "watch"])
async def test_heartbeats_come_while_a_job_waits_and_while_it_runs(method: str) -> None:
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    await known_model(bus)
    async with running_api(bus, settings(heartbeat_seconds=0.05)) as api:
        call = api.generate(spec(strength=1.0))
        if method == "watch":
            created = await api.create(spec(strength=1.0))
            call = api.watch(created.name)
        waiting = await read_until(call, "heartbeat", await read_until(call, "queued"))
        # Heartbeats come before the snapshot, too, if the machine is slow.
        shown = [m for m in waiting if m.event.WhichOneof("event") != "heartbeat"]
        shown = [*shown[:2], waiting[-1]]
        assert kinds(shown) == ["snapshot", "queued", "heartbeat"]
        assert [message.event.sequence for message in shown] == [0, 1, 1]
        assert {message.event.job for message in shown} == {shown[0].event.job}
        async with running_worker(bus, engine):
            running = await read_until(call, "heartbeat", await read_until(call, "step"))
            assert running[-1].event.sequence == running[-2].event.sequence
            engine.release()
            rest = [message async for message in call]
    everything = [*waiting, *running, *rest]
    assert kinds(everything)[-1] == "succeeded"
    # A second snapshot may say that the queued job waits for its model.
    others = ("heartbeat", "snapshot")
    log = [m.event.sequence for m in everything if m.event.WhichOneof("event") not in others]
    assert log == list(range(1, len(log) + 1))


async def test_heartbeats_come_before_the_job_exists_while_its_init_image_is_fetched() -> None:
    bus = memory_bus()
    goes_on = asyncio.Event()

    async def fetch(_: str) -> bytes:
        await goes_on.wait()
        return photo()

    config = settings(heartbeat_seconds=0.05)
    async with running_worker(bus), running_api(bus, config, fetch=fetch) as api:
        image = job_pb2.InitImage(url="https://example.com/cat.jpg")
        call = api.generate(spec(init_image=image))
        early = [await anext(aiter(call)) for _ in range(2)]
        assert [(m.event.WhichOneof("event"), m.event.job) for m in early] == [
            ("heartbeat", "")
        ] * 2
        goes_on.set()
        rest = [message async for message in call]
    events = [kind for kind in kinds(rest) if kind != "heartbeat"]
    assert (events[0], events[-1]) == ("snapshot", "succeeded")


async def test_heartbeats_can_be_turned_off_and_a_stopping_api_still_ends_its_streams() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus, settings(heartbeat_seconds=0)) as api:
        call = api.generate(spec())
        await read_until(call, "queued")
        api.stop.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(call))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
