"""Processes that die, stop and restart: no job is lost, and no event is missed or repeated."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc
from img2img_client import AsyncClient
from img2img_client.events import Event, Started, StepFinished
from img2img_server.lifecycle import RESTART_CODE
from tests.processes import Role
from tests.real_stack import LONG, PHOTO, RealStack, stack, worker
from tests.stack import DEV
from tests.tiny_models import ZERO_SNR_V, write_sd

__all__ = ["stack", "worker"]
pytestmark = pytest.mark.asyncio(loop_scope="module")


def started_by(events: list[Event]) -> list[str]:
    return [event.worker for event in events if isinstance(event, Started)]


async def test_a_killed_workers_job_is_finished_by_another_which_then_drains(
    stack: RealStack, tmp_path: Path
) -> None:
    model = str(write_sd(tmp_path / "twin", tiny_vae=True, scheduler=ZERO_SNR_V))
    request: dict[str, Any] = {**LONG, "model": "twin"}
    async with (
        stack.client() as client,
        stack.worker("castor", IMG2IMG_MODEL=model) as castor,
        stack.worker("pollux", IMG2IMG_MODEL=model) as pollux,
    ):
        workers = {"castor": castor, "pollux": pollux}
        calm = await client.generate("a cat", PHOTO, **request)
        events: list[Event] = []
        async with client.stream("a cat", PHOTO, **request) as stream:
            async for event in stream:
                events.append(event)
                if isinstance(event, StepFinished) and len(started_by(events)) == event.step == 1:
                    await workers[started_by(events)[0]].kill()
            result = await stream.result()
        dead, heir = started_by(events)
        assert dead != heir
        assert [event.sequence for event in events] == list(range(len(events)))
        assert (result.job.worker, result.job.attempt) == (heir, 2)
        assert result.images[0].sha256 == calm.images[0].sha256
        exit_code, last = await drained(client, workers[heir], request)
    assert exit_code == 0
    assert last.job.state == "succeeded"
    assert (last.job.worker, last.job.attempt) == (heir, 1)
    assert last.images[0].sha256 == calm.images[0].sha256


async def drained(client: AsyncClient, role: Role, request: dict[str, Any]) -> tuple[int, Any]:
    """Sends SIGTERM while a job runs; returns the exit code and the job's result."""
    stopping = None
    async with client.stream("a cat", PHOTO, **request) as stream:
        async for event in stream:
            if isinstance(event, StepFinished) and stopping is None:
                stopping = asyncio.create_task(role.stop())
        result = await stream.result()
    assert stopping is not None
    return await stopping, result


async def test_an_api_is_restarted_while_a_client_watches_without_gap_or_duplicate(
    stack: RealStack, worker: Role
) -> None:
    async with stack.client() as client:
        events: list[Event] = []
        restarted = 0
        async with client.stream("a cat", PHOTO, **LONG) as stream:
            async for event in stream:
                events.append(event)
                if isinstance(event, StepFinished) and event.step == 2:
                    assert await stack.api.stop() == 0
                    await stack.api.start()
                    restarted += 1
            result = await stream.result()
    assert restarted == 1
    assert [event.sequence for event in events] == list(range(len(events)))
    steps = [event.step for event in events if isinstance(event, StepFinished)]
    assert steps == list(range(1, 41))
    assert (result.job.state, result.job.attempt) == ("succeeded", 1)


async def test_a_worker_that_restarts_requeues_its_job_and_its_successor_finishes_it(
    stack: RealStack, worker: Role
) -> None:
    async with stack.client() as client:
        calm = await client.generate("a cat", PHOTO, **LONG)
        events: list[Event] = []
        async with client.stream("a cat", PHOTO, **LONG) as stream:
            async for event in stream:
                events.append(event)
                if isinstance(event, StepFinished) and len(started_by(events)) == event.step == 1:
                    await restart_workers(stack)
                    assert await worker.ended() == RESTART_CODE
                    await worker.start()
            result = await stream.result()
    assert started_by(events) == ["first", "first"]
    assert [type(event).__name__ for event in events].count("Queued") == 2
    assert (result.job.state, result.job.attempt) == ("succeeded", 1)
    assert result.images[0].sha256 == calm.images[0].sha256
    said = worker.log.read_text()
    assert "img2img-server worker: an operator requested a restart" in said
    assert "role_failed" not in said
    assert await worker.stop() == 0


async def restart_workers(stack: RealStack) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stack.grpc_port}") as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        await stub.RestartServer(admin_service_pb2.RestartServerRequest(), metadata=DEV)
