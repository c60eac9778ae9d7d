"""The service that img2img_server.testing offers to the tests of other projects."""

from __future__ import annotations

import asyncio

import pytest

from img2img_client import AsyncClient, Client, InvalidRequestError, JobCancelledError
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.service import running_service
from tests.stack import photo

SMALL = {"width": 256, "height": 256}


async def test_an_async_client_uses_the_channel_of_the_service() -> None:
    async with (
        running_service() as service,
        AsyncClient(channel=service.channel, api_key="dev-key") as client,
    ):
        result = await client.generate("p", photo(), seed=7, **SMALL)  # type: ignore[arg-type]
        assert (result.images[0].seed, result.images[0].width) == (7, 256)
        assert [job.name async for job in client.list()] == [result.job.name]
        with pytest.raises(InvalidRequestError):
            await client.create("", photo())


async def test_a_blocking_client_in_another_thread_uses_the_target() -> None:
    def use(target: str) -> str:
        with Client(target, api_key="dev-key") as client:
            return client.generate("p", photo(), **SMALL).job.state  # type: ignore[arg-type]

    async with running_service() as service:
        assert await asyncio.to_thread(use, service.target) == "succeeded"


async def test_a_job_of_a_held_engine_can_be_cancelled() -> None:
    async with (
        running_service(FakeEngine(hold_after=1)) as service,
        AsyncClient(channel=service.channel, api_key="dev-key") as client,
    ):
        job = await client.create("p", photo(), **SMALL)  # type: ignore[arg-type]
        await client.cancel(job)
        with pytest.raises(JobCancelledError):
            await client.watch(job).result()


async def test_a_held_job_runs_until_it_is_cancelled_and_does_not_stop_others() -> None:
    async with (
        running_service() as service,
        AsyncClient(channel=service.channel, api_key="dev-key") as client,
    ):
        held = await client.create("hold: p", photo(), **SMALL)  # type: ignore[arg-type]
        await client.generate("p", photo(), **SMALL)  # type: ignore[arg-type]
        assert (await client.get(held)).state == "running"
        await client.cancel(held)
        with pytest.raises(JobCancelledError):
            await client.watch(held).result()


async def test_an_error_of_the_block_passes_unchanged() -> None:
    with pytest.raises(LookupError):
        async with running_service():
            raise LookupError
