"""The cost of incomplete requests at the api: bytes, time and shares of tenants."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import REGISTRY
from receiver import until

from benchmarks.attack.http2 import INITIAL_WINDOW, Connection, grpc_message
from img2img.v1 import admin_service_pb2, service_pb2, service_pb2_grpc
from img2img_server.api import connections as api_connections
from img2img_server.api import interceptors, public, reflection
from img2img_server.api.interceptors import PACKAGE
from img2img_server.api.server import SERVICE_NAMES
from img2img_server.errors import ServerBusyError
from img2img_server.settings import DEV_KEY
from img2img_server.testing.bus import memory_bus
from tests.stack import (
    DEV,
    WAIT_SECONDS,
    Api,
    known_model,
    refusal,
    running_api,
    running_stack,
    settings,
    spec,
    two_tenants,
)

MIB = 2**20
QUIET_SECONDS = 0.3  # seconds without a window after which a stream is taken as held back
LOCAL_POOL = [("grpc.use_local_subchannel_pool", 1)]
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
GET_JOB = f"{PACKAGE}Img2ImgService/GetJob"


def key(value: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {value}"),)


@asynccontextmanager
async def raw_connection(api: Api) -> AsyncIterator[Connection]:
    connection = await Connection.open(int(api.address.rpartition(":")[2]))
    try:
        yield connection
    finally:
        await connection.close()


async def flood(
    connection: Connection, path: str, secret: str = "", *, calls: int, size: int
) -> list[int]:
    """Sends all but the last byte of a message of `size` bytes in many calls at once, until the
    server takes no more. Returns the number of bytes that it took of each.
    """
    data = grpc_message(bytes(size - 1), announced=size)
    streams = [await connection.call(path, secret) for _ in range(calls)]
    sends = [asyncio.create_task(connection.send(stream, data)) for stream in streams]
    before = -1
    while connection.sent.total() > before:
        before = connection.sent.total()
        await asyncio.sleep(QUIET_SECONDS)
    for send in sends:
        send.cancel()
    return [connection.sent[stream] for stream in streams]


async def test_requests_that_are_not_read_are_held_back_and_others_are_served(
    tmp_path: Path,
) -> None:
    keys, alpha, beta = two_tenants(tmp_path)
    bus = memory_bus()
    await known_model(bus)
    most = MIB
    config = settings(max_message_bytes=most, max_request_bytes=8 * most)
    async with (
        running_api(bus, config, keys=keys) as api,
        raw_connection(api) as connection,
    ):
        # F4: 30 calls whose last byte never arrives, of a method with small requests.
        taken = await flood(connection, GET_JOB, alpha, calls=30, size=most - 100)

        assert sum(taken) <= 8 * most + 30 * INITIAL_WINDOW
        # The tenant has half of the budget, and what HTTP/2 lets arrive of the other calls.
        assert len([size for size in taken if size > INITIAL_WINDOW]) == 4
        call = api.stub.CreateJob(
            service_pb2.CreateJobRequest(spec=spec()), metadata=key(beta), timeout=WAIT_SECONDS
        )
        assert (await call).job.id


async def test_a_call_waits_for_room_and_is_refused_with_the_time_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "WAIT_SECONDS", 0.2)
    config = settings(max_message_bytes=MIB, max_request_bytes=2 * MIB)
    async with (
        running_api(memory_bus(), config) as api,
        raw_connection(api) as connection,
    ):
        await flood(connection, GET_JOB, DEV_KEY, calls=1, size=MIB - 100)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.get("jobs/10000001")

        found = refusal(caught.value)
        assert (found.code, found.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            ServerBusyError.reason,
        )
        assert found.retry_seconds


async def test_a_request_that_does_not_arrive_in_time_ends_and_frees_its_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "RECEIVE_SECONDS", 0.2)
    config = settings(max_message_bytes=MIB, max_request_bytes=2 * MIB)
    async with (
        running_api(memory_bus(), config) as api,
        raw_connection(api) as connection,
    ):
        stream = await connection.call(GET_JOB, DEV_KEY)
        await connection.send(stream, grpc_message(bytes(1000), announced=MIB))
        async with asyncio.timeout(WAIT_SECONDS):
            await connection.until_ended(stream)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.get("jobs/10000001")
        assert refusal(caught.value).reason == "JOB_NOT_FOUND"


async def test_the_bytes_of_a_request_count_until_its_job_is_created() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def fetch(_: str) -> bytes:
        begun.set()
        await go_on.wait()
        raise AssertionError

    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus, fetch=fetch) as api:
        wanted = spec(init_image=None, annotations={"a": "x" * 1000})
        wanted.init_image.url = "https://files.example.org/harbour.png"
        call = api.generate(wanted)
        asking = asyncio.create_task(call.read())
        async with asyncio.timeout(WAIT_SECONDS):
            await begun.wait()
        assert await used() == service_pb2.GenerateRequest(spec=wanted).ByteSize()
        call.cancel()
        await asyncio.wait({asking})
        # The creation continues after the call.
        assert await used() > 0
        go_on.set()
        await until(used, 0.0)


async def test_the_bytes_of_a_request_are_freed_while_its_stream_goes_on() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        call = aiter(api.generate(spec()))
        await anext(call)
        await until(used, 0.0)


async def used() -> float:
    labels = {"budget": "request bytes"}
    return REGISTRY.get_sample_value("img2img_budget_used", labels) or 0.0


async def malformed(method: str) -> float:
    labels = {"method": method, "code": "INVALID_ARGUMENT"}
    return REGISTRY.get_sample_value("img2img_rpcs_total", labels) or 0.0


def methods() -> list[tuple[str, str]]:
    """Returns every method of the api with its service."""
    services = [
        file.services_by_name[name.rpartition(".")[2]]
        for file, name in zip(
            (service_pb2.DESCRIPTOR, admin_service_pb2.DESCRIPTOR), SERVICE_NAMES, strict=True
        )
    ]
    public_ones = [
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    ]
    found = [(each.full_name, m.name) for each in [*services, *public_ones] for m in each.methods]
    return [*found, ("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo")]


async def test_a_request_that_cannot_be_decoded_is_an_error_of_the_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    async with running_stack() as stack:
        for service, method in methods():
            before = await malformed(method)
            call = stack.api.channel.unary_unary(f"/{service}/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\x76", metadata=DEV, timeout=WAIT_SECONDS)
            found = refusal(caught.value)
            assert (found.code, found.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "MALFORMED_REQUEST",
            ), method
            # The call is counted after its end.
            await until(partial(malformed, method), before + 1)
    assert not caplog.records


async def test_a_call_without_a_request_is_an_error_of_the_caller() -> None:
    async def nothing() -> Any:
        return
        yield b""

    async with running_stack() as stack:
        call = stack.api.channel.stream_unary(GET_JOB)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(nothing(), metadata=DEV, timeout=WAIT_SECONDS)
    assert refusal(caught.value).reason == "MALFORMED_REQUEST"


async def test_a_large_name_of_a_service_is_refused_by_health_and_reflection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = "x" * (public.MAX_BYTES + 1)
    async with running_stack() as stack:
        health = health_pb2_grpc.HealthStub(stack.api.channel)
        request = health_pb2.HealthCheckRequest(service=large)
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=large)
        reflections = [
            stack.api.channel.unary_unary(f"/{name}/ServerReflectionInfo")
            for name in reflection.SERVICE_NAMES
        ]
        for call in (
            lambda: health.Check(request, timeout=WAIT_SECONDS),
            lambda: health.Watch(request, timeout=WAIT_SECONDS).read(),
            lambda: reflections[0](asked.SerializeToString(), timeout=WAIT_SECONDS),
            lambda: reflections[1](asked.SerializeToString(), timeout=WAIT_SECONDS),
        ):
            monkeypatch.setattr(public, "PENALTY_SECONDS", 0.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert refusal(caught.value).reason == "REQUEST_TOO_LARGE"
        # The next calls of the address are refused unread.
        monkeypatch.setattr(public, "PENALTY_SECONDS", 60.0)
        small = health_pb2.HealthCheckRequest()
        reasons = []
        for sent, key in ((request, ()), (small, ()), (small, DEV)):
            try:
                await health.Check(sent, metadata=key, timeout=WAIT_SECONDS)
                reasons.append("served")
            except grpc.aio.AioRpcError as error:
                reasons.append(refusal(error).reason)
        assert reasons == ["REQUEST_TOO_LARGE", "SERVER_BUSY", "served"]


async def test_refused_requests_of_health_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "PENALTY_SECONDS", 0.0)
    request = health_pb2.HealthCheckRequest(service="x" * 4 * MIB)
    async with running_api(memory_bus()) as api:
        health = health_pb2_grpc.HealthStub(api.channel)
        tracemalloc.start()
        gc.disable()  # grpc keeps the frames of an abort until the next collection.
        try:
            for _ in range(5):
                with pytest.raises(grpc.aio.AioRpcError):
                    await health.Check(request, timeout=WAIT_SECONDS)
            assert tracemalloc.get_traced_memory()[0] < 8 * MIB
        finally:
            gc.enable()
            tracemalloc.stop()


@pytest.mark.parametrize("path", [CHECK, WATCH])
async def test_unfinished_calls_of_health_take_bounded_memory_and_end(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "RECEIVE_SECONDS", 1.0)
    most = MIB
    async with (
        running_api(memory_bus(), settings(max_message_bytes=most)) as api,
        raw_connection(api) as connection,
    ):
        began = time.monotonic()
        taken = await flood(connection, path, calls=30, size=most - 100)

        # One peer reads two large requests at a time, for a second; 64 KiB of each other one
        # arrive. On a loaded machine the flood takes several seconds.
        turns = 1 + int(time.monotonic() - began)
        assert sum(taken) <= 2 * turns * most + 30 * INITIAL_WINDOW
        # A caller with a key does not share the budget of the address.
        health = health_pb2_grpc.HealthStub(api.channel)
        request = health_pb2.HealthCheckRequest()
        assert (await health.Check(request, metadata=DEV, timeout=WAIT_SECONDS)).status
        async with asyncio.timeout(WAIT_SECONDS):
            for stream in range(1, 61, 2):
                await connection.until_ended(stream)


async def test_streams_of_health_are_bounded_for_each_peer() -> None:
    async with running_stack() as stack:
        health = health_pb2_grpc.HealthStub(stack.api.channel)
        request = health_pb2.HealthCheckRequest()
        watches = [health.Watch(request) for _ in range(public.CALLS // 2 + 1)]
        ends = await asyncio.gather(*(each.read() for each in watches), return_exceptions=True)
        [refused] = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
        assert refusal(refused).reason == ServerBusyError.reason
        answer = await health.Check(request, metadata=DEV, timeout=WAIT_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for watch in watches:
            watch.cancel()


async def test_calls_of_two_tenants_leave_room_for_those_of_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "UNARY_CALLS", 40)
    keys, alpha, beta = two_tenants(tmp_path)
    async with (
        running_api(memory_bus(), keys=keys) as api,
        raw_connection(api) as connection,
    ):
        streams = [await connection.call(GET_JOB, alpha) for _ in range(40)]

        async def still_open() -> int:
            return len(streams) - len(connection.ended)

        await until(still_open, 20)  # The others are refused.
        request = service_pb2.GetCallerRequest()
        caller = await api.stub.GetCaller(request, metadata=key(beta), timeout=WAIT_SECONDS)
        assert caller.tenant == "b"


async def test_connections_beyond_the_limit_are_refused() -> None:
    async with running_api(memory_bus(), settings(max_grpc_connections=3)) as api:
        await api.stub.GetCaller(service_pb2.GetCallerRequest(), metadata=DEV)
        async with raw_connection(api) as one, raw_connection(api) as two:
            streams = [await each.call(CHECK) for each in (one, two)]
            assert len(streams) == 2
            async with raw_connection(api) as three, asyncio.timeout(WAIT_SECONDS):
                await three.until_ended(0)
        assert await api.stub.GetCaller(service_pb2.GetCallerRequest(), metadata=DEV)


async def test_connections_of_one_address_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api_connections, "SECONDS", 0.1)
    async with running_api(memory_bus(), settings(max_grpc_connections=20)) as api:
        port = int(api.address.rpartition(":")[2])
        request = service_pb2.GetCallerRequest()
        await api.stub.GetCaller(request, metadata=DEV, timeout=WAIT_SECONDS)
        opened = [await Connection.open(port, source="127.0.0.2") for _ in range(30)]
        try:

            async def still_open() -> int:
                return len([each for each in opened if not each.closed])

            # One connection is ours, so 19 are left: the address has 9 and leaves 10 free.
            await until(still_open, 9)
            assert not any(each.closed for each in opened[:9])
            # A new connection finds a place, and ours is still there.
            async with grpc.aio.insecure_channel(api.address, LOCAL_POOL) as channel:
                stub = service_pb2_grpc.Img2ImgServiceStub(channel)
                await stub.GetCaller(
                    request, metadata=DEV, timeout=WAIT_SECONDS, wait_for_ready=True
                )
            await api.stub.GetCaller(request, metadata=DEV, timeout=WAIT_SECONDS)
        finally:
            for each in opened:
                await each.close()
