"""Streams of events: whose job it is comes first, and removed logs are continued and reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from img2img.v1 import service_pb2
from img2img_server.nats import subjects
from img2img_server.nats.access import NatsAccess
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.nats.connection import connect
from img2img_server.nats.patched_client import PatchedClient
from img2img_server.settings import Settings
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_events import MemoryEventLog
from img2img_server.testing.memory_records import MemoryJobStore
from tests.stack import (
    kinds,
    read_until,
    refusal,
    running_api,
    running_stack,
    running_worker,
    settings,
    spec,
    two_tenants,
)


async def test_the_job_of_another_tenant_costs_one_read_and_opens_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = memory_bus()
    keys, key_a, key_b = two_tenants(tmp_path)
    calls = list[str]()
    for kind, name in ((MemoryEventLog, "watch"), (MemoryJobStore, "get")):
        original = getattr(kind, name)

        def counted(
            *values: Any, _name: str = name, _original: Any = original, **named: Any
        ) -> Any:
            calls.append(_name)
            return _original(*values, **named)

        monkeypatch.setattr(kind, name, counted)
    async with running_worker(bus), running_api(bus, keys=keys) as api:
        request = service_pb2.GenerateRequest(spec=spec())
        mine = (("authorization", f"Bearer {key_a}"),)
        async for message in api.stub.Generate(request, metadata=mine):
            job = message.event.job
        for name in (job, "jobs/19999999"):
            calls.clear()
            watch = service_pb2.WatchJobRequest(name=name)
            other = (("authorization", f"Bearer {key_b}"),)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.stub.WatchJob(watch, metadata=other).read()
            assert refusal(caught.value).reason == "JOB_NOT_FOUND"
            assert calls == ["get"]


async def remove_logs(config: Settings) -> None:
    async with connect(NatsAccess.from_settings(config)) as link:
        await link.js.purge_stream(subjects.EVENTS)


async def test_the_log_of_a_waiting_job_goes_on_with_the_next_number_after_its_removal(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings()
    async with connect_bus(config) as bus, running_api(bus) as api:
        async with running_worker(bus) as worker:
            await worker.drained()
        call = api.generate(spec())
        messages = await read_until(call, "queued")
        await remove_logs(config)
        async with running_worker(bus, name="w2"):
            messages += [message async for message in call]
        assert kinds(messages)[:3] == ["snapshot", "queued", "started"]
        numbers = [message.event.sequence for message in messages[1:]]
        assert numbers == list(range(1, len(numbers) + 1))
        late = [message async for message in api.watch(messages[0].event.job)]
        assert [message.event.missing_from for message in late[:3]] == [0, 1, 0]
        assert [m.event.sequence for m in late[1:]] == numbers[1:]


async def test_numbers_do_not_repeat_when_a_running_job_loses_log_and_worker(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings(ack_wait_seconds=1.0)
    async with connect_bus(config) as bus, running_api(bus) as api:
        engine = FakeEngine(hold_after=2)
        async with running_worker(bus, engine, name="dead", config=config) as worker:
            call = api.generate(spec(strength=1.0))
            messages = await read_until(call, "step")
            worker.task.cancel()
            await asyncio.wait([worker.task])
        await remove_logs(config)
        async with running_worker(bus, name="w2", config=config):
            messages += [message async for message in call]
        numbers = [message.event.sequence for message in messages[1:]]
        assert numbers == sorted(set(numbers))
        assert kinds(messages)[-1] == "succeeded"


async def test_a_complete_log_has_no_missing_events(bus: Bus) -> None:
    async with running_worker(bus), running_api(bus) as api:
        live = [message async for message in api.generate(spec())]
        assert not any(message.event.missing_from for message in live)
        name = live[0].event.job
        again = [message async for message in api.watch(name, after=3)]
        assert not any(message.event.missing_from for message in again)


async def test_the_leader_is_asked_for_events_when_a_replica_does_not_reply(
    engine_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, lost = PatchedClient.publish, list[str]()

    async def lossy(client: PatchedClient, subject: str, *args: Any, **options: Any) -> None:
        if subject.startswith("$JS.API.DIRECT.GET."):
            lost.append(subject)
        else:
            await publish(client, subject, *args, **options)

    monkeypatch.setattr(PatchedClient, "publish", lossy)
    config = engine_settings()
    async with connect_bus(config) as bus, running_worker(bus), running_api(bus) as api:
        live = [message async for message in api.generate(spec())]
        again = [message async for message in api.watch(live[0].event.job, after=0)]
    assert kinds(live)[-1] == kinds(again)[-1] == "succeeded"
    assert not any(message.event.missing_from for message in [*live, *again])
    assert len(lost) == len(set(lost)), "each stream's replicas are asked once in ten seconds"


async def test_the_end_of_a_job_whose_log_was_removed_has_its_own_number(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings()
    async with connect_bus(config) as bus, running_worker(bus), running_api(bus) as api:
        live = [message async for message in api.generate(spec())]
        await remove_logs(config)
        for after, missing in ((0, 1), (3, 4)):
            again = [message async for message in api.watch(live[0].event.job, after=after)]
            assert kinds(again) == ["snapshot", "succeeded"]
            assert again[-1].event.sequence == live[-1].event.sequence
            assert again[-1].event.missing_from == missing


async def test_a_place_is_held_from_the_creation_of_the_job_on() -> None:
    engine = FakeEngine(hold_after=1)
    async with running_stack(engine, api_config=settings(max_watchers=1)) as stack:
        stream = aiter(stack.api.generate(spec(strength=1.0)))
        first = await anext(stream)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.watch(first.event.job).read()
        found = refusal(caught.value)
        assert (found.reason, found.retry_seconds) == ("TOO_MANY_WATCHERS", 5.0)
        engine.release()
        assert kinds([message async for message in stream])[-1] == "succeeded"
