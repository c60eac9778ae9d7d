"""A bus that fails while a request is taken in: the same request, sent again, makes one job."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest

from img2img_server.bus import memory_bus
from img2img_server.errors import UnavailableError
from tests.stack import kinds, running_api, running_worker, spec


class FailsOnce:
    """A method that raises UnavailableError the first time."""

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
    put, release = FailsOnce(bus.queue.put), FailsOnce(bus.jobs.release_request)
    monkeypatch.setattr(bus.queue, "put", put)
    monkeypatch.setattr(bus.jobs, "release_request", release)
    request_id = str(uuid.uuid4())
    async with running_worker(bus), running_api(bus) as api:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await api.create(spec(), request_id=request_id)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        job = await api.create(spec(), request_id=request_id)
        events = [message async for message in api.watch(job.name)]
    assert (put.calls, release.calls) == (2, 1)
    assert kinds(events)[-1] == "succeeded"
    numbers = [message.event.sequence for message in events]
    assert numbers == list(range(len(numbers)))
