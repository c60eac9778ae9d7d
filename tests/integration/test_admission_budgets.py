"""Downloads and decoding before a job exists: one tenant leaves room to another."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from img2img.v1 import job_pb2, service_pb2
from img2img_server.testing.bus import memory_bus
from tests.stack import (
    WAIT_SECONDS,
    Api,
    photo,
    refusal,
    running_api,
    running_worker,
    spec,
    two_tenants,
)
from tests.stack import settings as service_settings


def create(api: Api, key: str, url: str) -> Any:
    request = service_pb2.CreateJobRequest(spec=spec(init_image=job_pb2.InitImage(url=url)))
    metadata = (("authorization", f"Bearer {key}"),)
    return api.stub.CreateJob(request, metadata=metadata, timeout=WAIT_SECONDS)


async def test_downloads_of_one_tenant_leave_room_for_another(tmp_path: Path) -> None:
    keys, alpha, beta = two_tenants(tmp_path)
    started: Counter[str] = Counter()
    release, full = asyncio.Event(), asyncio.Event()

    async def fetch(url: str) -> bytes:
        tenant = url.rpartition("/")[2]
        started[tenant] += 1
        if started["alpha"] == 3:
            full.set()
        if tenant == "alpha":
            await release.wait()
        return photo()

    config = service_settings(max_fetches=4, queue_limit=50)
    bus = memory_bus(queue_limit=50)
    async with running_worker(bus), running_api(bus, config, fetch=fetch, keys=keys) as api:
        calls = [create(api, alpha, "https://files.example.org/alpha") for _ in range(12)]
        await full.wait()

        await create(api, beta, "https://files.example.org/beta")

        assert started == {"alpha": 3, "beta": 1}
        release.set()
        await asyncio.gather(*calls)
    assert started["alpha"] == 12


async def test_downloaded_bytes_beyond_the_budget_are_refused_with_the_time_to_wait(
    tmp_path: Path,
) -> None:
    keys, alpha, beta = two_tenants(tmp_path)

    async def fetch(url: str) -> bytes:
        return bytes(25 * 2**20) if url.endswith("alpha") else photo()

    bus = memory_bus()
    config = service_settings(max_fetched_bytes=32 * 2**20)
    async with running_worker(bus), running_api(bus, config, fetch=fetch, keys=keys) as api:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await create(api, alpha, "https://files.example.org/alpha")
        found = refusal(caught.value)
        assert (found.code, found.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SERVER_BUSY",
        )
        assert found.retry_seconds
        await create(api, beta, "https://files.example.org/beta")
