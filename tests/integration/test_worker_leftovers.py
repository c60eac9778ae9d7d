"""Files of unsuccessful jobs are deleted from the service's own bucket. All other files remain."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

import pytest
from receiver import until

from img2img_server.domain.events import Cancelled, Event, Failed, Queued, Started, Succeeded
from img2img_server.domain.job import Job, advance
from img2img_server.domain.params import Lane
from img2img_server.errors import StorageError
from img2img_server.interfaces.queue import Delivery
from img2img_server.nats.bus import Bus
from img2img_server.tasks import background_task
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.worker import worker as worker_module
from img2img_server.worker.orphan_cleanup import OrphanCleanup
from tests.http_stack import running_gateway
from tests.stack import (
    kinds,
    known_model,
    read_until,
    running_api,
    running_worker,
    settings,
    spec,
)

NO_WAIT = settings(s3_wait_seconds=0.0)


class HalfStore(MemoryBlobStore):
    """Stores first samples at once. A second sample waits for the first one and for `refuse`, and
    is then rejected.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.first_stored = asyncio.Event()
        self.refuse = asyncio.Event()

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        if "-1." in key:
            await self.stored[key.replace("-1.", "-0.")].wait()
            await self.refuse.wait()
            raise StorageError("the object store refused: AccessDenied")
        await super().put(key, data, media_type)
        self.stored[key].set()
        self.first_stored.set()

    async def kept(self) -> set[str]:
        return {key for key in self.stored if await self.stat(key)}


def key_of(link: str) -> str:
    return link.split("/", 3)[3]


@pytest.mark.parametrize("base64", [False, True])
@pytest.mark.parametrize("temp", [False, True])
async def test_a_failed_jobs_stored_files_are_deleted(base64: bool, temp: bool) -> None:
    bus, blobs = memory_bus(), HalfStore()
    blobs.refuse.set()
    async with (
        running_worker(bus, blobs=blobs, config=NO_WAIT) as worker,
        running_api(bus) as api,
    ):
        good = await read_until(api.generate(spec(base64=base64, temp=temp)), "succeeded")
        failing = api.generate(spec(samples=2, base64=base64, temp=temp))
        assert kinds([m async for m in failing])[-1] == "failed"
        await worker.drained()
    kept = key_of(good[-1].event.succeeded.job.samples[0].url)
    assert len(blobs.stored) == 2
    assert await blobs.kept() == {kept}


async def test_the_link_of_a_failed_job_answers_404_again() -> None:
    blobs = HalfStore()
    async with running_gateway({"blobs": blobs, "config": NO_WAIT}) as gateway:
        made = (await gateway.create(samples=2, instant_response=True)).json()
        link = made["future_links"][0]
        await blobs.first_stored.wait()
        assert (await gateway.http.get(link)).status_code == 200
        blobs.refuse.set()

        async def status() -> int:
            return (await gateway.http.get(link)).status_code

        await until(status, 404)
        assert (await gateway.fetch(made["id"])).json()["status"] == "failed"


async def take(bus: Bus) -> Delivery:
    """Takes the only message as a worker does."""
    (delivery,) = await bus.queue.pull("fake", [Lane.REALTIME], 1, 10.0)
    return delivery


async def advanced(bus: Bus, job_id: int, *events: Event) -> Job:
    """Changes the record as a worker does and returns the job."""
    stored = await bus.jobs.get("dev", job_id)
    assert stored is not None
    job = stored.job
    for event in events:
        job = advance(job, event, time.time())
    await bus.jobs.update(job, stored.revision)
    return job


STARTED = Started(worker="earlier", model="fake", attempt=1)


async def test_a_job_that_is_cancelled_between_two_attempts_loses_the_files_of_the_first() -> None:
    bus, blobs = memory_bus(), HalfStore()
    await blobs.prepare()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        delivery = await take(bus)
        record = await advanced(bus, job.id, STARTED, Queued())
        await blobs.put(record.file_key(0), b"a picture", "image/png")
        await delivery.nak()
        await api.cancel(job.name)
        async with running_worker(bus, blobs=blobs):
            await until(blobs.kept, set())


async def test_what_a_worker_did_not_live_to_delete_the_next_one_does() -> None:
    bus, blobs = memory_bus(ack_wait_seconds=0.1), HalfStore()
    await blobs.prepare()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        await take(bus)
        failed = Failed(reason="ENGINE_FAILED", message="broke")
        record = await advanced(bus, job.id, STARTED, failed)
        await blobs.put(record.file_key(0), b"a picture", "image/png")
        async with running_worker(bus, blobs=blobs):
            await until(blobs.kept, set())


@pytest.mark.parametrize(
    ("events", "stays"),
    [
        ((STARTED,), True),
        ((STARTED, Queued()), True),
        ((STARTED, Succeeded()), True),
        ((STARTED, Failed(reason="ENGINE_FAILED", message="broke")), False),
        ((STARTED, Cancelled()), False),
    ],
    ids=["another worker has it", "it waits again", "it succeeded", "it failed", "it is cancelled"],
)
async def test_a_worker_that_lost_a_job_deletes_its_files_only_where_no_worker_needs_them(
    events: tuple[Event, ...], stays: bool
) -> None:
    bus, blobs = memory_bus(), HalfStore()
    await blobs.prepare()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        lost = await advanced(bus, job.id, STARTED)
        await advanced(bus, job.id, *(events[1:] or events))
    await blobs.put(lost.file_key(0), b"a picture", "image/png")
    leftovers = OrphanCleanup(bus.jobs, blobs)
    leftovers.add(lost)
    async with background_task(leftovers.run()):
        await leftovers.finish(10.0)
    assert await blobs.kept() == ({lost.file_key(0)} if stays else set())


class HangingStore(HalfStore):
    """A store whose deletes hang."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def delete(self, key: str) -> None:
        self.asked.set()
        await asyncio.Event().wait()


class RefusingStore(HangingStore):
    """A store that rejects deletes."""

    async def delete(self, key: str) -> None:
        self.asked.set()
        raise StorageError("the object store refused: AccessDenied")


@pytest.mark.parametrize("kind", [HangingStore, RefusingStore])
async def test_a_store_that_does_not_delete_holds_up_no_end_no_job_and_no_stop(
    kind: type[HangingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "CLEANUP_SECONDS", 0.05)
    bus, blobs = memory_bus(), kind()
    blobs.refuse.set()
    one_at_a_time = FakeEngine(max_batch_size=1)
    async with (
        running_worker(bus, one_at_a_time, blobs=blobs, config=NO_WAIT) as worker,
        running_api(bus) as api,
    ):
        failed = [m async for m in api.generate(spec(samples=2))]
        assert failed[-1].event.failed.job.error.reason == "STORAGE_UNAVAILABLE"
        async with asyncio.timeout(30):
            await blobs.asked.wait()
        assert kinds([m async for m in api.generate(spec())])[-1] == "succeeded"
        async with asyncio.timeout(30):
            await worker.drained()
