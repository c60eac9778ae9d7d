"""Management calls in both modes and through the SDK (docs/http-contract.md#management)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration

from img2img.v1 import admin_service_pb2
from img2img_server import __version__
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.compat.modelslab.responses import system_details
from img2img_server.domain.events import StepFinished
from img2img_server.errors import PermissionDeniedError
from img2img_server.lifecycle import RestartError
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from tests.contract.test_http_contract_sdk import call, realtime
from tests.http_stack import (
    ENTERPRISE,
    Gateway,
    body,
    error_body,
    fetch_photo,
    gateway_before,
    legacy_error_body,
    running_gateway,
    served_gateway,
)
from tests.stack import WAIT_SECONDS, Stack, running_api, running_worker

CALLS = [
    "system_details",
    "restart_server",
    "update_server",
    "update",
    "clear_cache",
    "clear_queue",
]
KEY = {"key": "dev-key"}


@pytest_asyncio.fixture(params=[False, True], ids=["today", "legacy"])
async def gateway(request: pytest.FixtureRequest) -> AsyncIterator[Gateway]:
    """Yields a gateway without a worker, so that no worker is restarted."""
    bus = memory_bus()
    async with running_worker(bus) as worker:
        await worker.drained()
        async with (
            running_api(bus, fetch=fetch_photo) as api,
            gateway_before(Stack(bus, api, worker), legacy=request.param) as running,
        ):
            yield running


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("restart_server", "server restarting"),
        ("update_server", "Server updated successfully"),
        ("update", "Server updated successfully"),
        ("clear_cache", "Cache cleared successfully"),
        ("clear_queue", "Queue cleared, server is restarting"),
    ],
)
async def test_a_call_answers_with_its_text(name: str, message: str, gateway: Gateway) -> None:
    for headers, sent in (({}, KEY), ({"Authorization": "Bearer dev-key"}, {})):
        answer = await gateway.http.post(f"{ENTERPRISE}/{name}", json=sent, headers=headers)
        assert (answer.status_code, answer.json()) == (
            200,
            {"status": "success", "message": message},
        )


async def test_system_details_have_the_sibling_shapes_joined(gateway: Gateway) -> None:
    reported = (await gateway.http.post(f"{ENTERPRISE}/system_details", json=KEY)).json()
    uptime = reported["data"].pop("uptime")
    assert re.fullmatch(r"\d+d \d+h \d+m", uptime)
    assert reported == {
        "status": "success",
        "message": "",
        "model_count": 0,
        "queue_num": 0,
        "queue_time": 0.0,
        "data": {"server_version": __version__, "gpu_usage": "0%"},
    }


def test_system_details_read_as_in_the_contract() -> None:
    reported = admin_service_pb2.GetSystemDetailsResponse(
        server_version="1.0.0",
        uptime=Duration(seconds=((5 * 24 + 12) * 60 + 30) * 60 + 59),
        model_count=1,
        queued_jobs=2,
        queue_duration=Duration(seconds=3, nanos=400_000_000),
        gpu_usage=0.4512,
    )
    assert system_details(reported) == {
        "status": "success",
        "message": "",
        "model_count": 1,
        "queue_num": 2,
        "queue_time": 3.4,
        "data": {"server_version": "1.0.0", "uptime": "5d 12h 30m", "gpu_usage": "45%"},
    }


@pytest.mark.parametrize("name", CALLS)
async def test_a_wrong_key_is_reported_before_a_missing_right(
    name: str, gateway: Gateway, tmp_path: Path
) -> None:
    key, entry = new_key("b", ["unsafe"])
    file = tmp_path / "keys.toml"
    file.write_text(entry)
    legacy = (await gateway.http.post("/nowhere")).json().get("messege") is not None
    path = f"{ENTERPRISE}/{name}"
    async with (
        running_api(gateway.stack.bus, keys=KeyRing(file, dev_key=False)) as api,
        gateway_before(gateway.stack, address=api.address, legacy=legacy) as guarded,
    ):
        unknown = await guarded.http.post(path, json={"key": "wrong"})
        denied = await guarded.http.post(path, json={"key": key})
        no_object = await guarded.http.post(path, content=b"[]")
    codes = [answer.status_code for answer in (no_object, unknown, denied)]
    assert codes == ([200] * 3 if legacy else [400, 401, 403])
    message = str(PermissionDeniedError("operate"))
    expected = legacy_error_body(message) if legacy else error_body("PERMISSION_DENIED", message)
    assert denied.json() == expected


async def test_other_methods_are_405(gateway: Gateway) -> None:
    for name in CALLS:
        answer = await gateway.http.get(f"{ENTERPRISE}/{name}")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST, OPTIONS")


@asynccontextmanager
async def busy_gateway() -> AsyncIterator[tuple[Gateway, int]]:
    """Yields a gateway whose only worker runs a job, and the job's id."""
    engine = FakeEngine(hold_after=1, max_batch_size=1)
    async with running_gateway({"engine": engine}) as gateway:
        running = (await gateway.create(instant_response=True)).json()["id"]
        async with gateway.stack.bus.events.watch(running) as log:
            async for entry in log:
                if isinstance(entry.event, StepFinished):
                    break
        yield gateway, running


async def test_a_cleared_job_fails_with_queue_cleared_and_running_ones_finish() -> None:
    async with busy_gateway() as (gateway, running):
        waiting = (await gateway.create(instant_response=True)).json()["id"]
        await gateway.http.post(f"{ENTERPRISE}/clear_queue", json=KEY)
        reported = await gateway.fetch(waiting)
        assert (reported.status_code, reported.json()) == (
            200,
            {"status": "failed", "id": waiting, "message": "Queue cleared", "output": []},
        )
        gateway.stack.worker.engine.release()
        async for _ in gateway.stack.api.watch(f"jobs/{running}"):
            pass
        assert (await gateway.fetch(running)).json()["status"] == "success"


async def test_a_post_that_waits_reports_that_the_queue_was_cleared() -> None:
    async with busy_gateway() as (gateway, running):
        waiting = asyncio.create_task(gateway.http.post(f"{ENTERPRISE}/img2img", json=body()))
        async with gateway.stack.bus.events.watch(running + 1) as log:
            await anext(log)
        await gateway.http.post(f"{ENTERPRISE}/clear_queue", json=KEY)
        reported = await waiting
        assert (reported.status_code, reported.json()) == (
            200,
            {"status": "failed", "id": running + 1, "message": "Queue cleared", "output": []},
        )


# The official SDK.


@pytest.mark.filterwarnings("ignore:The `dict` method:DeprecationWarning")
async def test_the_sdk_manages_the_server() -> None:
    async with served_gateway() as gateway:
        api = realtime(gateway)
        details = await call(api.system_details)
        assert (details["status"], details["model_count"]) == ("success", 1)
        reported = [
            await call(method)
            for method in (api.clear_cache, api.clear_queue, api.update, api.restart)
        ]
        assert [(each["status"], each["message"]) for each in reported] == [
            ("success", "Cache cleared successfully"),
            ("success", "Queue cleared, server is restarting"),
            ("success", "Server updated successfully"),
            ("success", "server restarting"),
        ]
        assert gateway.engine.caches_cleared == 1
        await asyncio.wait([gateway.stack.worker.task], timeout=WAIT_SECONDS)
        assert isinstance(gateway.stack.worker.task.exception(), RestartError)


@pytest.mark.filterwarnings("ignore:The `dict` method:DeprecationWarning")
async def test_the_asynchronous_sdk_restarts_and_updates_too() -> None:
    async with served_gateway() as gateway:
        api = realtime(gateway)
        async with api.client as client:
            client.fetch_timeout = 20
            reported = [await api.async_update(), await api.async_restart()]
        assert [each["message"] for each in reported] == [
            "Server updated successfully",
            "server restarting",
        ]
