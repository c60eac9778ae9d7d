"""Jobs that may succeed with a part of their samples."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_client import AsyncClient
from img2img_server.domain.events import StepFinished
from img2img_server.engine.base import EngineEvent, EngineJob, JobDone, JobFailed, SampleReady, Sink
from img2img_server.errors import EngineError, StorageError
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.stack import photo, read_until, running_api, running_worker, settings, spec

TOO_LARGE = StorageError("the object store refused: EntityTooLarge", final=True)


class PickyStore(MemoryBlobStore):
    """A store that refuses the samples of these indices."""

    def __init__(self, *refused: int) -> None:
        super().__init__()
        self._refused = refused

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        if any(f"-{index}." in key for index in self._refused):
            raise TOO_LARGE
        await super().put(key, data, media_type)


async def picky(*refused: int) -> tuple[PickyStore, WatchedBlobs]:
    blobs = PickyStore(*refused)
    await blobs.prepare()
    return blobs, WatchedBlobs(blobs, pauses_seconds=(0.01,))


async def test_a_job_succeeds_with_the_samples_that_are_stored() -> None:
    bus, (blobs, store) = memory_bus(), await picky(1)
    async with running_worker(bus, blobs=store), running_api(bus) as api:
        log = await read_until(api.generate(spec(samples=3, allow_partial=True)), "succeeded")
        job = log[-1].event.succeeded.job
        assert [bool(sample.url) for sample in job.samples] == [True, False, True]
        assert [sample.HasField("error") for sample in job.samples] == [False, True, False]
        error = job.samples[1].error
        assert (error.reason, error.retryable) == ("STORAGE_UNAVAILABLE", True)
        assert (job.device, job.warning) == ("fake", "")
        assert len([key for key in blobs.stored_keys() if "generations" in key]) == 2


@pytest.mark.parametrize(
    ("refused", "allow_partial"), [((0, 1, 2), True), ((1,), False)], ids=["none", "not allowed"]
)
async def test_a_job_fails_without_a_stored_sample_or_without_the_permission(
    refused: tuple[int, ...], allow_partial: bool
) -> None:
    bus, (_, store) = memory_bus(), await picky(*refused)
    async with running_worker(bus, blobs=store), running_api(bus) as api:
        request = spec(samples=3, allow_partial=allow_partial)
        log = await read_until(api.generate(request), "failed")
        job = log[-1].event.failed.job
        assert job.error.reason == "STORAGE_UNAVAILABLE"
        assert not any(sample.HasField("error") for sample in job.samples)


class LateFailure(FakeEngine):
    """An engine that fails after the first sample of a job is ready."""

    def submit(self, job: EngineJob, sink: Sink) -> None:
        def failing(event: EngineEvent) -> None:
            if isinstance(event, JobDone):
                sink(JobFailed(EngineError("the second sample broke")))
            elif not (isinstance(event, SampleReady | StepFinished) and event.sample):
                sink(event)

        super().submit(job, failing)


async def test_a_job_whose_engine_fails_later_keeps_its_samples() -> None:
    bus = memory_bus()
    async with running_worker(bus, LateFailure()), running_api(bus) as api:
        log = await read_until(api.generate(spec(samples=2, allow_partial=True)), "succeeded")
        job = log[-1].event.succeeded.job
        assert job.samples[0].url
        assert job.samples[1].error.message == "the second sample broke"
        assert job.timings.HasField("upload")
        log = await read_until(api.generate(spec(samples=2)), "failed")
        assert not log[-1].event.failed.job.samples[1].HasField("error")


class Stuck(MemoryBlobStore):
    """A store that hangs at the second sample."""

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        if "-1." in key:
            await asyncio.Event().wait()
        await super().put(key, data, media_type)


async def test_a_job_without_attempts_left_ends_with_the_samples_of_the_earlier_ones() -> None:
    bus, config = memory_bus(ack_wait_seconds=0.2), settings(max_attempts=1)
    async with running_api(bus) as api:
        stream = api.generate(spec(samples=2, allow_partial=True))
        async with running_worker(bus, blobs=Stuck(), name="doomed", config=config) as doomed:
            log = await read_until(stream, "sample_stored")
            doomed.task.cancel()
            await asyncio.gather(doomed.task, return_exceptions=True)
        async with running_worker(bus, name="heir", config=config):
            await read_until(stream, "succeeded", log)
    samples = log[-1].event.succeeded.job.samples
    assert samples[0].url
    assert samples[1].error.reason == "ATTEMPTS_EXHAUSTED"


async def test_the_client_returns_the_images_that_there_are() -> None:
    bus = memory_bus()
    async with (
        running_worker(bus, LateFailure()),
        running_api(bus) as api,
        AsyncClient(api.address, api_key="dev-key") as client,
    ):
        options: Any = {"samples": 2, "allow_partial": True, "width": 256, "height": 256}
        result = await client.generate("a cat", photo(), **options)
        assert [image.index for image in result.images] == [0]
        assert result.job.samples[0].error is None
        error = result.job.samples[1].error
        assert error is not None
        assert error.reason == "ENGINE_FAILED"
        assert result.job.spec.allow_partial


async def test_one_sample_is_never_partial() -> None:
    bus, (_, store) = memory_bus(), await picky(0)
    async with running_worker(bus, blobs=store), running_api(bus) as api:
        log = await read_until(api.generate(spec(allow_partial=True)), "failed")
        assert log[-1].event.failed.job.state == job_pb2.Job.STATE_FAILED
