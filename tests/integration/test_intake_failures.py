"""NATS fails while a request is accepted: the repeated request creates exactly one job."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest

from img2img_server.errors import MessageTooLargeError, UnavailableError
from img2img_server.testing.bus import memory_bus
from tests.stack import kinds, running_api, running_worker, spec


class FailsOnce:
    """A proxy whose method raises UnavailableError at the first call."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self.calls = 0

    async def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise UnavailableError
        return await self._method(*args)


async def test_a_request_whose_first_try_left_its_log_behind_makes_its_job_the_second_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = memory_bus()
    put, abandon = FailsOnce(bus.queue.put), FailsOnce(bus.jobs.abandon)
    monkeypatch.setattr(bus.queue, "put", put)
    monkeypatch.setattr(bus.jobs, "abandon", abandon)
    request_id = str(uuid.uuid4())
    async with running_worker(bus), running_api(bus) as api:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await api.create(spec(), request_id=request_id)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        job = await api.create(spec(), request_id=request_id)
        events = [message async for message in api.watch(job.name)]
    assert (put.calls, abandon.calls) == (2, 1)
    assert kinds(events)[-1] == "succeeded"
    numbers = [message.event.sequence for message in events]
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MessageTooLargeError(), grpc.StatusCode.FAILED_PRECONDITION),
        (RuntimeError("an internal error"), grpc.StatusCode.INTERNAL),
        (UnavailableError(), grpc.StatusCode.UNAVAILABLE),
    ],
)
@pytest.mark.parametrize("request_id", ["", "5b0f6f0e-8a53-4c0e-9a0e-3a1b6a3f2d11"])
async def test_a_job_that_cannot_be_queued_leaves_neither_record_nor_permit(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: grpc.StatusCode, request_id: str
) -> None:
    bus = memory_bus()

    async def put(*_: Any) -> Any:
        raise error

    async with running_worker(bus), running_api(bus) as api:
        monkeypatch.setattr(bus.queue, "put", put)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await api.create(spec(), request_id=request_id)
        assert refused.value.code() is code
        (drawn,) = await bus.jobs.list_ids("dev")
        assert await bus.jobs.get("dev", drawn) is None
        assert await bus.permits.count("dev") == 0
