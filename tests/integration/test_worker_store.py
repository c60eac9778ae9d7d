"""A worker whose object store rejects files: it keeps running, takes no jobs, and continues by
itself.
"""

from __future__ import annotations

import asyncio

from img2img.v1 import job_pb2
from img2img_server.errors import StorageError
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.stack import kinds, read_until, running_api, running_worker, spec


class AwayStore(MemoryBlobStore):
    """A store that rejects files until the test allows them. `probed` is set by each probe."""

    def __init__(self) -> None:
        super().__init__()
        self.away = True
        self.probed = asyncio.Event()

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        await self.prove_writable()
        await super().put(key, data, media_type)

    async def prove_writable(self) -> None:
        self.probed.set()
        if self.away:
            raise StorageError("the object store cannot be reached", "IMG2IMG_S3_ENDPOINT_URL: …")


async def test_while_the_store_is_away_no_job_is_taken_and_later_they_are() -> None:
    bus, blobs = memory_bus(), AwayStore()
    await blobs.prepare()
    store = WatchedBlobs(blobs, pauses_seconds=(0.01,))
    async with running_worker(bus, blobs=store) as worker, running_api(bus) as api:
        messages = [message async for message in api.generate(spec())]
        assert kinds(messages)[-1] == "failed"
        assert messages[-1].event.failed.job.error.reason == "STORAGE_UNAVAILABLE"
        assert store.trouble == "IMG2IMG_S3_ENDPOINT_URL: …"
        waiting = await api.create(spec())
        for _ in range(3):
            blobs.probed.clear()
            await blobs.probed.wait()
        assert (await api.get(waiting.name)).state == job_pb2.Job.STATE_QUEUED
        blobs.away = False
        await read_until(api.watch(waiting.name), "succeeded")
        assert store.trouble == ""
        await worker.drained()


async def test_a_job_that_was_pulled_while_the_store_went_away_goes_back_at_once() -> None:
    bus, blobs = memory_bus(ack_wait_seconds=60.0), AwayStore()
    await blobs.prepare()
    store = WatchedBlobs(blobs, pauses_seconds=(0.01,))
    async with running_worker(bus, blobs=store), running_api(bus) as api:
        first = [message async for message in api.generate(spec())]
        assert kinds(first)[-1] == "failed"
        # The worker's pull was waiting when the store failed, so it gets this job.
        waiting = await api.create(spec())
        blobs.away = False
        done = await read_until(api.watch(waiting.name), "succeeded")
        assert done[-1].event.succeeded.job.state == job_pb2.Job.STATE_SUCCEEDED
