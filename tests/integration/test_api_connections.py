"""Connections to the api are renewed, so that new apis get their share of the calls."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from img2img.v1 import job_pb2
from img2img_server.testing.bus import memory_bus
from tests.stack import Api, known_model, running_api, spec


def connections(api: Api) -> set[int]:
    """Returns our ports of the connections to this port."""
    port = int(api.address.rpartition(":")[2])
    found = psutil.Process().net_connections(kind="tcp")
    return {each.laddr.port for each in found if each.raddr and each.raddr.port == port}


async def test_new_calls_take_a_new_connection_while_a_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.api.server.CONNECTION_AGE_MS", 200)
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        (first,) = connections(api)
        stream = aiter(api.watch(job.name))
        await anext(stream)
        async with asyncio.timeout(30):
            while connections(api) == {first}:
                await api.get(job.name)
        assert first in connections(api)
        await api.cancel(job.name)
        ends = [event.event.WhichOneof("event") async for event in stream]
        assert ends[-1] == "cancelled"
        assert (await api.get(job.name)).state == job_pb2.Job.STATE_CANCELLED
