"""A worker whose store cannot be used: finished images wait, other workers get its jobs."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from receiver import until

from img2img.v1 import job_pb2
from img2img_server.errors import StorageError
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.stack import kinds, read_until, running_api, running_worker, settings, spec

WAITING = "WAITING_FOR_STORAGE"


class AwayStore(MemoryBlobStore):
    """A store that rejects files while `error` is set, and hangs while `hangs` is set.

    `refused`: keys that it rejects permanently. `tries`: the number of puts.
    """

    def __init__(self, error: StorageError | None = None) -> None:
        super().__init__()
        self.error = error
        self.refused = ""
        self.answers = asyncio.Event()
        self.answers.set()
        self.tries = 0
        self.putting = asyncio.Event()

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        self.tries += 1
        self.putting.set()
        await self.answers.wait()
        if self.refused and key.endswith(self.refused):
            raise StorageError("the object store refused: EntityTooLarge", final=True)
        await self.prove_writable()
        await super().put(key, data, media_type)

    async def prove_writable(self) -> None:
        if self.error:
            raise self.error


AWAY = StorageError("the object store cannot be reached", "IMG2IMG_S3_ENDPOINT_URL: …")
DENIED = StorageError(
    "the object store refused: AccessDenied", "IMG2IMG_S3_ACCESS_KEY: …", final=True
)


class CountingEngine(FakeEngine):
    """A FakeEngine that counts its jobs."""

    jobs = 0

    def submit(self, job, sink) -> None:  # type: ignore[no-untyped-def]
        self.jobs += 1
        super().submit(job, sink)


async def watched(
    error: StorageError | None = None, **options: float
) -> tuple[AwayStore, WatchedBlobs]:
    blobs = AwayStore(error)
    await blobs.prepare()
    options = {"slow_seconds": 0.05, **options}
    return blobs, WatchedBlobs(blobs, pauses_seconds=(0.01,), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["refuses connections", "does not respond"])
async def test_images_wait_for_the_store_while_steps_continue_and_no_job_runs_twice(
    how: str,
) -> None:
    bus, (blobs, store) = memory_bus(), await watched()
    if how == "does not respond":
        blobs.answers.clear()
    else:
        blobs.error = AWAY
    # One job fills the batch, so an image that waits must not count.
    engine = CountingEngine(max_batch_size=1)
    async with running_worker(bus, engine, blobs=store), running_api(bus) as api:
        streams = [api.generate(spec(seed=seed)) for seed in range(5)]
        logs = [await read_until(stream, "storage_waiting") for stream in streams]
        assert engine.jobs == 5
        job = await api.get(logs[0][0].event.job)
        assert (job.state, job.state_reason) == (job_pb2.Job.STATE_RUNNING, WAITING)
        assert logs[0][-1].event.storage_waiting.reason.startswith("the object store")
        blobs.error = None
        blobs.answers.set()
        for stream, log in zip(streams, logs, strict=True):
            await read_until(stream, "succeeded", log)
            assert kinds(log).count("started") == 1
            done = log[-1].event.succeeded.job
            assert (done.attempt, done.state_reason) == (1, "")
        assert engine.jobs == 5
        assert store.trouble == ""


async def test_a_worker_pulls_no_jobs_while_the_bytes_that_wait_reach_their_bound() -> None:
    bus, (_, probe) = memory_bus(), await watched()
    sizes: list[int] = []
    probe.put = lambda key, data, *_: _noted(sizes, data)  # type: ignore[method-assign]
    async with running_worker(bus, blobs=probe), running_api(bus) as api:
        await read_until(api.generate(spec()), "succeeded")
    blobs, store = await watched(AWAY, wait_bytes=int(sizes[0] * 2.5))
    engine = CountingEngine(max_batch_size=1)
    async with running_worker(bus, engine, blobs=store), running_api(bus) as api:
        jobs = [await api.create(spec()) for _ in range(8)]
        await read_until(api.watch(jobs[2].name), "storage_waiting")
        last = await api.get(jobs[-1].name)
        assert last.state == job_pb2.Job.STATE_QUEUED
        assert engine.jobs < len(jobs)
        blobs.error = None
        for job in jobs:
            await read_until(api.watch(job.name), "succeeded")


async def _noted(sizes: list[int], data: bytes) -> None:
    sizes.append(len(data))


async def test_a_worker_whose_store_refuses_fails_no_job_next_to_a_healthy_one() -> None:
    bus, (_, bad), (_, good) = memory_bus(queue_limit=50), await watched(DENIED), await watched()
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(running_api(bus))
        for name, store in (("bad", bad), ("good", good)):
            engine = FakeEngine(max_batch_size=2, step_seconds=0.002)
            await stack.enter_async_context(running_worker(bus, engine, name=name, blobs=store))
        jobs = [await api.create(spec()) for _ in range(30)]
        done = [
            (await read_until(api.watch(job.name), "succeeded"))[-1].event.succeeded.job
            for job in jobs
        ]
        assert {job.worker for job in done} == {"good"}
        assert not bad.takes_work
        assert bad.trouble.startswith("IMG2IMG_S3_ACCESS_KEY")


async def test_images_of_the_only_worker_wait_until_its_store_accepts_it_again() -> None:
    bus, (blobs, store) = memory_bus(), await watched(DENIED)
    async with running_worker(bus, blobs=store), running_api(bus) as api:
        stream = api.generate(spec())
        log = await read_until(stream, "storage_waiting")
        waiting = await api.create(spec())
        tries = blobs.tries
        async with asyncio.timeout(30):
            while blobs.tries < tries + 5:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert (await api.get(waiting.name)).state == job_pb2.Job.STATE_QUEUED
        blobs.error = None
        await read_until(stream, "succeeded", log)
        assert log[-1].event.succeeded.job.attempt == 1
        await read_until(api.watch(waiting.name), "succeeded")


async def test_a_file_that_the_store_refuses_although_it_takes_others_fails_its_job() -> None:
    bus, (blobs, store) = memory_bus(), await watched()
    blobs.refused = "-1.png"
    async with running_worker(bus, blobs=store), running_api(bus) as api:
        failed = [message async for message in api.generate(spec(samples=2))]
        assert failed[-1].event.failed.job.error.reason == "STORAGE_UNAVAILABLE"
        await read_until(api.generate(spec()), "succeeded")
        assert store.trouble == ""


@pytest.mark.parametrize("how", ["waits", "is being stored"])
async def test_a_job_is_cancelled_also_while_its_images_are_stored(how: str) -> None:
    bus, (blobs, store) = memory_bus(), await watched()
    if how == "waits":
        blobs.error = AWAY
    else:
        blobs.answers.clear()
    async with running_worker(bus, blobs=store), running_api(bus) as api:
        stream = api.generate(spec(samples=2))
        log = await read_until(stream, "storage_waiting")
        await api.cancel(log[0].event.job)
        await read_until(stream, "cancelled", log)
        blobs.error = None
        blobs.answers.set()
        job = log[-1].event.cancelled.job
        assert (job.state, job.state_reason) == (job_pb2.Job.STATE_CANCELLED, "")

        async def kept() -> list[str]:
            return [key for key in blobs.stored_keys() if "generations" in key]

        await until(kept, [])


async def test_a_cancel_that_was_accepted_before_the_end_wins() -> None:
    """The message of the cancel to the worker is lost; only the record has the request."""
    bus, (blobs, store) = memory_bus(), await watched()
    blobs.answers.clear()
    async with running_worker(bus, blobs=store) as worker, running_api(bus) as api:
        stream = api.generate(spec())
        log = await read_until(stream, "sample_finished")
        await blobs.putting.wait()
        bus.control.cancel = _lost  # type: ignore[method-assign]
        job = await api.cancel(log[0].event.job)
        assert job.state == job_pb2.Job.STATE_RUNNING
        blobs.answers.set()
        log += [message async for message in stream]
        assert kinds(log)[-2:] == ["sample_stored", "cancelled"]
        await worker.drained()


async def _lost(_: int) -> None: ...


async def test_a_store_that_is_idle_is_tested() -> None:
    blobs, store = await watched(idle_seconds=0.02)
    watching = asyncio.create_task(store.watch())
    blobs.error = AWAY

    async def trouble() -> str:
        return store.trouble

    await until(trouble, AWAY.detail)
    blobs.error = None
    await until(trouble, "")
    watching.cancel()


async def test_a_file_that_failed_just_before_another_succeeded_is_tried_again() -> None:
    blobs, store = await watched()
    watching = asyncio.create_task(store.watch())
    blobs.error = AWAY

    async def other(_: str) -> None:
        blobs.error = None
        await store.put("generations/b.png", b"b", "image/png")
        await asyncio.sleep(0.1)  # `watch` notices that the store can be used.
        assert store.trouble == ""

    async with asyncio.timeout(30):
        await store.put("generations/a.png", b"a", "image/png", other)
    assert sorted(blobs.stored_keys()) == ["generations/a.png", "generations/b.png"]
    watching.cancel()


async def test_a_worker_that_stops_does_not_wait_for_its_store() -> None:
    bus, (_, store) = memory_bus(), await watched(AWAY)
    _, good = await watched()
    async with running_api(bus) as api:
        async with running_worker(
            bus, blobs=store, name="cut off", config=settings(drain_seconds=0.1)
        ) as worker:
            stream = api.generate(spec())
            log = await read_until(stream, "storage_waiting")
            await worker.drained()
        async with running_worker(bus, blobs=good, name="other"):
            await read_until(stream, "succeeded", log)
    assert kinds(log).count("started") == 2


class HalfStore(AwayStore):
    """A store that takes the first sample of a job and hangs at the second."""

    def __init__(self) -> None:
        super().__init__()
        self.answers.clear()
        self.keys: list[str] = []

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        self.keys.append(key)
        if "-0." in key:
            await MemoryBlobStore.put(self, key, data, media_type)
            return
        await super().put(key, data, media_type)


@pytest.mark.parametrize("end", ["killed", "stopped"])
async def test_stored_samples_of_a_lost_worker_are_not_made_again(end: str) -> None:
    bus = memory_bus(ack_wait_seconds=0.3)
    request = spec(samples=3, output_format=job_pb2.IMAGE_FORMAT_PNG)
    half = HalfStore()
    await half.prepare()
    async with running_api(bus) as api:
        async with running_worker(bus, name="calm"):
            calm = (await read_until(api.generate(request), "succeeded"))[-1].event.succeeded.job
        stream = api.generate(request)
        config = settings(drain_seconds=0.05)
        async with running_worker(bus, blobs=half, name="doomed", config=config) as doomed:
            log = await read_until(stream, "sample_stored")
            if end == "killed":
                doomed.task.cancel()
                await asyncio.gather(doomed.task, return_exceptions=True)
            else:
                half.error = AWAY
                half.answers.set()
                await read_until(stream, "storage_waiting", log)
                await doomed.drained()
        heirs = HalfStore()
        heirs.answers.set()
        await heirs.prepare()
        async with running_worker(bus, name="heir", blobs=heirs):
            await read_until(stream, "succeeded", log)
    starts = [message.event.started for message in log if message.event.HasField("started")]
    assert [list(start.stored_samples) for start in starts] == [[], [0]]
    assert not [key for key in heirs.keys if "-0." in key]
    job = log[-1].event.succeeded.job
    assert [each.sha256 for each in job.samples] == [each.sha256 for each in calm.samples]
    assert kinds(log).count("sample_stored") == 3
