"""Management calls over real gRPC: their permissions and effects."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from img2img.v1 import admin_service_pb2 as admin
from img2img.v1 import admin_service_pb2_grpc, job_pb2, service_pb2
from img2img_client import AsyncClient, UnauthenticatedError
from img2img_server import __version__
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.api.server import Webhooks
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.interfaces.records import ConflictError
from img2img_server.lifecycle import RestartError
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from img2img_server.webhooks.sender import Outcome
from img2img_server.webhooks.signature import Signer
from tests.stack import (
    DEV,
    WAIT_SECONDS,
    Api,
    kinds,
    read_until,
    refusal,
    running_api,
    running_worker,
    settings,
    spec,
)

CALLS = [
    *("GetSystemDetails", "RestartServer", "UpdateServer", "ClearCache", "ClearQueue", "ListKeys"),
    *("LoadModel", "UnloadModel"),
]


async def call(api: Api, method: str, metadata: Any = DEV) -> Any:
    stub = admin_service_pb2_grpc.AdminServiceStub(api.channel)
    request = getattr(admin, f"{method}Request")()
    if "model" in request.DESCRIPTOR.fields_by_name:
        request.model = FAKE_MODEL.name
    return await getattr(stub, method)(request, metadata=metadata, timeout=WAIT_SECONDS)


@dataclass
class Shops:
    """Two tenants: "a" may operate the service, "b" may not."""

    ring: KeyRing
    a: Any
    b: Any


def shops(folder: Path, only_b: str = "unsafe") -> Shops:
    key_a, entry_a = new_key("a", ["operate"])
    key_b, entry_b = new_key("b", [only_b, "unsafe"])
    file = folder / "keys.toml"
    file.write_text(f"{entry_a}\n{entry_b}\n")
    metadata = [(("authorization", f"Bearer {key}"),) for key in (key_a, key_b)]
    return Shops(KeyRing(file, dev_key=False), *metadata)


async def create(api: Api, metadata: Any) -> job_pb2.Job:
    request = service_pb2.CreateJobRequest(spec=spec())
    return (await api.stub.CreateJob(request, metadata=metadata, timeout=WAIT_SECONDS)).job


async def get(api: Api, job: job_pb2.Job, metadata: Any) -> job_pb2.Job:
    request = service_pb2.GetJobRequest(name=job.name)
    return (await api.stub.GetJob(request, metadata=metadata, timeout=WAIT_SECONDS)).job


@asynccontextmanager
async def announced() -> AsyncIterator[Bus]:
    """Yields a bus on which the fake model is announced although no worker runs."""
    bus = memory_bus()
    worker = WorkerInfo(name="w", model=FAKE_MODEL, device="cpu", has_catalogue=True)
    await bus.workers.announce(worker)
    yield bus


@pytest.mark.parametrize("method", CALLS)
async def test_a_management_call_needs_a_key(method: str) -> None:
    async with announced() as bus, running_api(bus) as api:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(api, method, metadata=())
        assert refusal(caught.value).code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", CALLS)
async def test_a_call_that_concerns_every_tenant_needs_the_permission_operate(
    method: str, tmp_path: Path
) -> None:
    keys = shops(tmp_path)
    async with announced() as bus, running_api(bus, keys=keys.ring) as api:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(api, method, keys.b)
        found = refusal(caught.value)
        assert (found.code, found.reason, found.metadata) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "PERMISSION_DENIED",
            {"permission": "operate"},
        )
        await call(api, method, keys.a)


@pytest.mark.parametrize("method", ["UpdateStorageSettings", "ResetStorageSettings"])
async def test_a_tenants_storage_settings_need_the_permission_storage(
    method: str, tmp_path: Path
) -> None:
    keys = shops(tmp_path, "storage")
    request = getattr(service_pb2, f"{method}Request")()
    async with announced() as bus, running_api(bus, keys=keys.ring) as api:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(api.stub, method)(request, metadata=keys.a)
        assert refusal(caught.value).metadata == {"permission": "storage"}
        if method == "ResetStorageSettings":
            await api.stub.ResetStorageSettings(request, metadata=keys.b)


async def test_system_details_count_only_the_own_jobs_of_a_key_without_operate(
    tmp_path: Path,
) -> None:
    keys = shops(tmp_path, "storage")
    async with announced() as bus, running_api(bus, keys=keys.ring) as api:
        for metadata in (keys.a, keys.a, keys.b):
            await create(api, metadata)
        counts = [(await call(api, CALLS[0], key)).queued_jobs for key in (keys.a, keys.b)]
    assert counts == [3, 1]


async def test_clear_queue_ends_the_tenants_waiting_jobs_and_no_others(tmp_path: Path) -> None:
    keys = shops(tmp_path)
    bus = memory_bus(queue_limit=3)
    engine = FakeEngine(hold_after=1, max_batch_size=1)
    async with running_worker(bus, engine), running_api(bus, keys=keys.ring) as api:
        running = await create(api, keys.a)
        watch = service_pb2.WatchJobRequest(name=running.name)
        stream = api.stub.WatchJob(watch, metadata=keys.a, timeout=WAIT_SECONDS)
        await read_until(stream, "step")
        waiting = [await create(api, keys.a) for _ in range(2)]
        strangers = await create(api, keys.b)
        with pytest.raises(grpc.aio.AioRpcError):  # The queue is full.
            await create(api, keys.a)
        assert (await call(api, "ClearQueue", keys.a)).cleared_jobs == 2
        for job in waiting:
            ended = await get(api, job, keys.a)
            assert ended.state == job_pb2.Job.STATE_FAILED
            assert ended.error.reason == "QUEUE_CLEARED"
            request = service_pb2.WatchJobRequest(name=job.name)
            events = [m async for m in api.stub.WatchJob(request, metadata=keys.a)]
            assert kinds(events) == ["snapshot", "queued", "failed"]
        assert (await get(api, running, keys.a)).state == job_pb2.Job.STATE_RUNNING
        assert (await get(api, strangers, keys.b)).state == job_pb2.Job.STATE_QUEUED
        assert (await call(api, "ClearQueue", keys.a)).cleared_jobs == 0
        await create(api, keys.a)  # The queue has room again.
        engine.release()
        await read_until(stream, "succeeded")


async def test_clear_queue_ends_more_jobs_than_are_read_together() -> None:
    bus = memory_bus(queue_limit=80)
    await bus.workers.announce(WorkerInfo(name="w", model=FAKE_MODEL, device="cpu"))
    async with running_api(bus, settings(queue_limit=80)) as api:
        for _ in range(70):
            await api.create(spec())
        assert (await call(api, "ClearQueue")).cleared_jobs == 70


async def test_a_cleared_job_sends_its_webhook() -> None:
    found: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def post(address: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        found.put_nowait((address, json.loads(body)))
        return Outcome(delivered=True)

    hook = "https://hooks.example.org/a"
    async with (
        announced() as bus,
        running_api(bus, webhooks=Webhooks(post, Signer())) as api,
    ):
        job = await api.create(spec(webhook=hook))
        await call(api, "ClearQueue")
        address, body = await asyncio.wait_for(found.get(), WAIT_SECONDS)
    assert address == hook
    assert (body["status"], body["id"], body["message"]) == ("failed", job.id, "Queue cleared")


async def test_clear_queue_looks_again_at_a_job_that_moves_on_meanwhile() -> None:
    async with announced() as bus:
        jobs = bus.jobs

        class Moving:
            """A store whose first update of a failed job conflicts, as if a worker were faster."""

            moved = 0

            def __getattr__(self, name: str) -> Any:
                return getattr(jobs, name)

            async def update(self, job: Any, revision: int) -> int:
                if job.failure and not self.moved:
                    self.moved += 1
                    raise ConflictError
                return await jobs.update(job, revision)

        async with running_api(replace(bus, jobs=Moving())) as api:  # type: ignore[arg-type]
            job = await api.create(spec())
            assert (await call(api, "ClearQueue")).cleared_jobs == 1
            assert (await api.get(job.name)).error.reason == "QUEUE_CLEARED"


@pytest.mark.parametrize("method", ["RestartServer", "UpdateServer"])
async def test_a_restart_hands_running_jobs_back_and_asks_for_a_new_process(method: str) -> None:
    bus = memory_bus()
    async with running_api(bus) as api:
        async with running_worker(bus, FakeEngine(hold_after=1), name="old") as old:
            stream = api.generate(spec(strength=1.0))
            messages = await read_until(stream, "step")
            await call(api, method)
            await asyncio.wait([old.task], timeout=WAIT_SECONDS)
            assert isinstance(old.task.exception(), RestartError)
            assert await bus.workers.workers() == []
        async with running_worker(bus, name="new"):
            messages += [m async for m in stream]
    starts = [m.event.started.worker for m in messages if m.event.HasField("started")]
    assert starts == ["old", "new"]
    assert kinds(messages).count("queued") == 2
    job = messages[-1].event.succeeded.job
    assert (job.worker, job.state) == ("new", job_pb2.Job.STATE_SUCCEEDED)


async def test_a_stop_that_comes_during_a_restart_is_a_stop() -> None:
    bus = memory_bus()
    async with running_api(bus) as api, running_worker(bus) as worker:
        worker.stop.set()
        await call(api, "RestartServer")
        await worker.task
        assert worker.task.exception() is None


async def test_clear_cache_reaches_the_engine() -> None:
    bus = memory_bus()
    async with running_api(bus) as api, running_worker(bus) as worker:
        await call(api, "ClearCache")
        assert worker.engine.caches_cleared == 1
        assert not worker.task.done()


async def test_clear_cache_deletes_downloads_and_outlives_trouble_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: asyncio.Queue[str] = asyncio.Queue()

    def forget(source: str) -> int:
        loop.call_soon_threadsafe(asked.put_nowait, source)
        raise OSError("read-only file system")

    loop = asyncio.get_running_loop()
    monkeypatch.setattr("img2img_server.worker.server.forget_downloads", forget)
    bus, config = memory_bus(), settings(model="acme/sd")
    async with running_api(bus) as api, running_worker(bus, config=config) as worker:
        for _ in range(2):
            await call(api, "ClearCache")
            assert await asyncio.wait_for(asked.get(), WAIT_SECONDS) == "acme/sd"
        assert not worker.task.done()


async def test_system_details_tell_models_queue_and_use() -> None:
    bus = memory_bus()
    other = replace(FAKE_MODEL, name="other")
    for info in (
        WorkerInfo(name="c", model=other, device="cpu", busy=1.0),
        WorkerInfo(name="g1", model=FAKE_MODEL, device="H100", job_seconds=2.0, busy=0.8),
        WorkerInfo(name="g2", model=FAKE_MODEL, device="H100", job_seconds=4.0, busy=0.1),
    ):
        await bus.workers.announce(info)
    async with running_api(bus) as api:
        for _ in range(3):
            await api.create(spec())
        found = await call(api, "GetSystemDetails")
    assert (found.server_version, found.model_count, found.queued_jobs) == (__version__, 2, 3)
    assert found.queue_duration.ToTimedelta().total_seconds() == 4.5  # 3 jobs of 3 s on 2 workers
    assert found.gpu_usage == pytest.approx(0.45)
    assert 0.0 < found.uptime.ToTimedelta().total_seconds() < WAIT_SECONDS


async def test_the_models_of_a_worker_share_its_gpu() -> None:
    bus = memory_bus()
    for number, (name, state, busy) in enumerate(
        (
            ("w1/a", ModelState.LOADED, 0.5),
            ("w1/b", ModelState.LOADED, 0.3),
            ("w1/c", ModelState.COLD, 0.0),
            ("w2/a", ModelState.LOADED, 0.2),
        )
    ):
        await bus.workers.announce(
            WorkerInfo(
                name=name,
                model=replace(FAKE_MODEL, name=name[-1]),
                device="H100" if number != 2 else "",
                busy=busy,
                model_state=state,
                has_catalogue=True,
            )
        )
    async with running_api(bus) as api:
        found = await call(api, "GetSystemDetails")
    assert (found.model_count, found.gpu_usage) == (3, pytest.approx(0.5))


async def test_system_details_without_any_worker_are_zero() -> None:
    async with running_api(memory_bus()) as api:
        found = await call(api, "GetSystemDetails")
    assert (found.model_count, found.queued_jobs, found.gpu_usage) == (0, 0, 0.0)
    assert found.queue_duration.ToTimedelta().total_seconds() == 0.0


async def test_keys_are_listed_with_their_last_use_and_an_expired_one_is_refused(
    tmp_path: Path,
) -> None:
    past, later = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
    boss, *entries = new_key("a", ["operate"], key_id="boss", expire_time=later)
    old, entry = new_key("b", [], key_id="old", label="the old shop", expire_time=past)
    _, unused = new_key("b", [])
    file = tmp_path / "keys.toml"
    file.write_text("\n".join([*entries, entry, unused]))
    bus = memory_bus()
    async with running_api(bus, keys=KeyRing(file, dev_key=False)) as api:
        async with AsyncClient(api.address, api_key=old) as expired:
            with pytest.raises(UnauthenticatedError, match="The API key has expired") as caught:
                await expired.caller()
        assert caught.value.reason == "API_KEY_EXPIRED"
        async with AsyncClient(api.address, api_key=boss) as client:
            caller = await client.caller()
            first, second, third = await client.admin.keys()
            assert (await client.admin.keys())[0] != first  # The list itself is a use.
    assert (caller.key_id, caller.expire_time) == ("boss", later)
    assert (first.id, first.permissions, first.has_expired) == ("boss", ("operate",), False)
    assert first.last_use_time is not None
    assert (second.id, second.label, second.expire_time) == ("old", "the old shop", past)
    assert (second.has_expired, second.last_use_time) == (True, None)
    assert (third.expire_time, third.last_use_time) == (None, None)
    stored = await bus.key_uses.read()  # The api has written it when it stopped.
    assert set(stored) == {"boss"}
    refused = 'img2img_refused_total{reason="API_KEY_EXPIRED",tenant="b"}'
    assert refused in generate_latest().decode()
