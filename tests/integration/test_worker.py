"""A worker whose dependencies fail: no job is lost, and none runs twice."""

import asyncio
import base64
import dataclasses
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_server.domain.events import Started, Succeeded
from img2img_server.domain.job import advance
from img2img_server.domain.params import Lane
from img2img_server.engine.base import JobFailed
from img2img_server.errors import SafetyCheckError, StorageError
from img2img_server.imaging import decoder
from img2img_server.imaging.base import not_an_image
from img2img_server.interfaces.queue import Delivery
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.worker.lease import DELIVERIES_OF_AN_ATTEMPT
from tests.stack import (
    RunningWorker,
    kinds,
    known_model,
    read_until,
    running_api,
    running_stack,
    running_worker,
    settings,
    spec,
)

PNG = job_pb2.IMAGE_FORMAT_PNG


async def test_a_killed_workers_job_is_finished_by_another_with_the_same_image() -> None:
    bus = memory_bus(ack_wait_seconds=0.3)
    request = spec(strength=1.0, output_format=PNG)
    async with running_api(bus) as api:
        async with running_worker(bus, name="calm"):
            undisturbed = await read_until(api.generate(request), "succeeded")
        async with running_worker(bus, FakeEngine(hold_after=2), name="doomed") as doomed:
            call = api.generate(request)
            messages = await read_until(call, "step")
            doomed.task.cancel()  # The worker sends neither ack nor nak nor a withdrawal.
            await asyncio.gather(doomed.task, return_exceptions=True)
            async with running_worker(bus, name="heir"):
                messages += [m async for m in call]
    starts = [m.event.started for m in messages if m.event.HasField("started")]
    assert [(it.worker, it.attempt) for it in starts] == [("doomed", 1), ("heir", 2)]
    numbers = [m.event.sequence for m in messages]
    assert numbers == list(range(len(numbers)))
    job = messages[-1].event.succeeded.job
    assert job.samples[0].sha256 == undisturbed[-1].event.succeeded.job.samples[0].sha256


class SilentDelivery:
    """A delivery whose in-progress messages are lost."""

    def __init__(self, inner: Delivery) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def in_progress(self) -> None: ...


class SilentQueue:
    """A queue whose in-progress messages are lost."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def pull(self, *arguments: Any, **options: Any) -> list[Any]:
        taken = await self._inner.pull(*arguments, **options)
        return [SilentDelivery(delivery) for delivery in taken]


async def test_a_worker_that_came_back_from_the_dead_cannot_write_any_more() -> None:
    bus = memory_bus(ack_wait_seconds=0.3)
    silent = dataclasses.replace(bus, queue=SilentQueue(bus.queue))
    frozen = FakeEngine(hold_after=1, max_batch_size=1)
    async with running_api(bus) as api, running_worker(silent, frozen, name="frozen") as first:
        call = api.generate(spec(strength=1.0))
        messages = await read_until(call, "step")
        async with running_worker(bus, name="heir"):
            messages += [m async for m in call]
        frozen.release()  # The worker continues without a notice of the loss.
        await first.drained()
        job_id = int(messages[0].event.job.split("/")[1])
        last = (await bus.events.open(job_id)).sequence
    assert kinds(messages).count("succeeded") == 1
    assert messages[-1].event.sequence == last  # The worker has written nothing after the end.
    assert messages[-1].event.succeeded.job.worker == "heir"


@pytest.mark.parametrize(
    ("deliveries", "runs"),
    [(2, 2), (DELIVERIES_OF_AN_ATTEMPT * 2, 0)],
    ids=["in its run", "before its record says that it runs"],
)
async def test_a_job_that_kills_its_workers_fails_at_last_and_lands_in_the_dead_letters(
    deliveries: int, runs: int
) -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        for attempt in range(1, deliveries + 1):
            delivery = await take(bus)
            assert delivery is not None
            if attempt <= runs:
                stored = await bus.jobs.get("dev", job.id)
                assert stored is not None
                started = Started(worker="doomed", model="fake", attempt=attempt)
                await bus.jobs.update(advance(stored.job, started, time.time()), stored.revision)
            await delivery.nak()  # NATS redelivers the message in the same way after its ack_wait.
        async with running_worker(bus, config=settings(max_attempts=2)):
            messages = [m async for m in api.watch(job.name)]
    error = messages[-1].event.failed.job.error
    assert error.reason == "ATTEMPTS_EXHAUSTED"
    ((dead, reason),) = bus.queue.dead  # type: ignore[attr-defined]
    assert (dead.job_id, dead.init_image, reason) == (job.id, b"", "ATTEMPTS_EXHAUSTED")


async def test_a_job_that_is_handed_on_without_a_run_loses_no_attempt() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        for _ in range(5):
            delivery = await take(bus)
            assert delivery is not None
            await delivery.nak()
        async with running_worker(bus, config=settings(max_attempts=1)):
            messages = [m async for m in api.watch(job.name)]
    assert kinds(messages)[-1] == "succeeded"
    assert messages[-1].event.succeeded.job.attempt == 1


async def eventually(reached: Callable[[], Awaitable[bool]]) -> None:
    """Polls until the condition is true, for changes without an event."""
    async with asyncio.timeout(30):
        while not await reached():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def take(bus: Bus) -> Delivery | None:
    """Takes one message as a worker does."""
    found = await bus.queue.pull("fake", [Lane.REALTIME], 1, 1.0)
    return found[0] if found else None


async def test_a_writer_that_died_before_its_last_word_gets_it_said_by_the_next_worker() -> None:
    bus = memory_bus(ack_wait_seconds=0.1)
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        assert await take(bus) is not None
        stored = await bus.jobs.get("dev", job.id)
        assert stored is not None
        started = Started(worker="doomed", model="fake", attempt=1)
        record = advance(advance(stored.job, started, time.time()), Succeeded(), time.time())
        await bus.jobs.update(record, stored.revision)  # The worker dies here.
        async with running_worker(bus) as worker:

            async def ended() -> bool:
                return (await bus.events.open(job.id)).ended

            await eventually(ended)
            await worker.drained()
        messages = [m async for m in api.watch(job.name)]
        assert kinds(messages) == ["snapshot", "queued", "succeeded"]
        await asyncio.sleep(0.15)  # A message without an ack would be redelivered now.
        assert await bus.queue.depth("fake", Lane.REALTIME) == 0


async def test_a_cancel_request_outlives_the_worker_that_should_have_received_it() -> None:
    bus = memory_bus(ack_wait_seconds=0.2)
    async with running_api(bus) as api:
        async with running_worker(bus, FakeEngine(hold_after=1)) as doomed:
            call = api.generate(spec(strength=1.0))
            messages = await read_until(call, "step")
            doomed.task.cancel()
            await asyncio.gather(doomed.task, return_exceptions=True)
        await api.cancel(messages[0].event.job)
        async with running_worker(bus, name="heir"):
            messages += [m async for m in call]
    assert kinds(messages)[-1] == "cancelled"
    assert kinds(messages).count("started") == 1


async def killed(worker: RunningWorker, bus: Bus, name: str) -> None:
    """Ends a worker without a message, and its announcement as if it had expired."""
    worker.task.cancel()
    await asyncio.gather(worker.task, return_exceptions=True)
    await bus.workers.withdraw(name)


async def test_a_job_whose_worker_is_lost_is_queued_with_the_reason() -> None:
    bus = memory_bus(ack_wait_seconds=0.2)
    async with running_api(bus) as api:
        async with running_worker(bus, FakeEngine(hold_after=1), name="doomed") as doomed:
            call = api.generate(spec(strength=1.0))
            messages = await read_until(call, "step")
            name = messages[0].event.job
            assert (await api.get(name)).state == job_pb2.Job.STATE_RUNNING
            await killed(doomed, bus, "doomed")
            lost = await api.reaches(name, job_pb2.Job.STATE_QUEUED)
            assert lost.state_reason == "WORKER_LOST"
            assert not lost.HasField("start_time")
        async with running_worker(bus, name="heir"):
            messages += [m async for m in call]
    assert kinds(messages)[-1] == "succeeded"
    assert messages[-1].event.succeeded.job.state_reason == ""


async def test_an_open_stream_says_each_time_that_the_worker_is_lost() -> None:
    bus = memory_bus(ack_wait_seconds=0.2)
    async with running_api(bus, settings(heartbeat_seconds=0.05)) as api:
        watching = None
        for name in ("first", "second"):
            async with running_worker(bus, FakeEngine(hold_after=1), name=name) as doomed:
                watching = watching or api.generate(spec(strength=1.0))
                await read_until(watching, "step")
                await killed(doomed, bus, name)
            async for message in watching:
                if message.event.snapshot.job.state_reason == "WORKER_LOST":
                    break
        async with running_worker(bus, name="heir"):
            await read_until(watching, "succeeded")


async def test_a_job_whose_worker_is_lost_is_cancelled_without_another_worker() -> None:
    bus, blobs = memory_bus(ack_wait_seconds=0.2), MemoryBlobStore()
    async with running_api(bus) as api:
        async with running_worker(bus, FakeEngine(hold_after=1), name="doomed") as doomed:
            call = api.generate(spec(strength=1.0))
            messages = await read_until(call, "step")
            await killed(doomed, bus, "doomed")
            job = await api.cancel(messages[0].event.job)
            assert job.state == job_pb2.Job.STATE_CANCELLED
            messages += [m async for m in call]
        assert kinds(messages)[-1] == "cancelled"
        async with running_worker(bus, name="heir", blobs=blobs):

            async def acknowledged() -> bool:
                return await bus.queue.unfinished("dev") == 0

            await eventually(acknowledged)


async def test_a_job_of_a_draining_worker_runs() -> None:
    bus = memory_bus()
    engine = FakeEngine(hold_after=1)
    async with running_api(bus) as api, running_worker(bus, engine) as worker:
        messages = await read_until(api.generate(spec(strength=1.0), detach=True), "step")
        worker.stop.set()

        async def draining() -> bool:
            return not await bus.workers.workers()

        await eventually(draining)
        job = await api.get(messages[0].event.job)
        assert (job.state, job.state_reason) == (job_pb2.Job.STATE_RUNNING, "")
        engine.release()
        await worker.drained()
        assert await bus.workers.names() == set()


class BrokenBlobStore(MemoryBlobStore):
    """A store that rejects all files."""

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        raise StorageError("the object store does not answer")


async def test_a_store_that_takes_nothing_fails_the_job_and_says_that_a_retry_may_help() -> None:
    bus, config = memory_bus(), settings(s3_wait_seconds=0.1)
    async with (
        running_worker(bus, blobs=BrokenBlobStore(), config=config),
        running_api(bus) as api,
    ):
        messages = [m async for m in api.generate(spec(samples=2))]
        error = messages[-1].event.failed.job.error
        assert (error.reason, error.retryable) == ("STORAGE_UNAVAILABLE", True)


class BrokenSafetyChecker:
    """A checker that always fails."""

    turn = nullcontext()

    async def warm_up(self) -> None: ...

    def check(self, pixels: object) -> float:
        raise SafetyCheckError("the safety model does not load")


async def test_a_safety_check_that_cannot_run_fails_the_job_instead_of_being_skipped() -> None:
    bus = memory_bus()
    async with running_worker(bus, safety=BrokenSafetyChecker()), running_api(bus) as api:
        messages = [m async for m in api.generate(spec())]
        assert messages[-1].event.failed.job.error.reason == "SAFETY_CHECK_UNAVAILABLE"
        assert "sample_finished" not in kinds(messages)
        good = [m async for m in api.generate(spec(safety_checker=False))]
        assert kinds(good)[-1] == "succeeded"


class SurprisingEngine(FakeEngine):
    """An engine that fails with an unexpected error."""

    def submit(self, job: Any, sink: Any) -> None:
        sink(JobFailed(ZeroDivisionError("in /secret/path.py")))


async def test_an_unforeseen_error_fails_the_job_without_telling_where() -> None:
    bus = memory_bus()
    async with running_worker(bus, SurprisingEngine()), running_api(bus) as api:
        messages = [m async for m in api.generate(spec())]
        error = messages[-1].event.failed.job.error
        assert error.reason == "ENGINE_FAILED"
        assert "secret" not in error.message


async def test_a_job_whose_record_has_expired_goes_to_the_dead_letters() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec())
        stored = await bus.jobs.get("dev", job.id)
        assert stored is not None
        await bus.jobs.abandon("dev", job.id, stored.revision)
        async with running_worker(bus) as worker:

            async def is_dead_letter() -> bool:
                return bool(bus.queue.dead)  # type: ignore[attr-defined]

            await eventually(is_dead_letter)
            await worker.drained()
        assert [reason for _, reason in bus.queue.dead] == [  # type: ignore[attr-defined]
            "its record has expired"
        ]


async def test_realtime_jobs_are_taken_before_batch_jobs() -> None:
    bus = memory_bus()
    engine = FakeEngine(hold_after=1, max_batch_size=1)
    async with running_worker(bus, engine), running_api(bus) as api:
        await api.create(spec(strength=1.0))  # This job keeps the worker busy.
        batch = await api.create(spec(lane=job_pb2.LANE_BATCH))
        realtime = await api.create(spec())
        engine.release()
        ends = [
            (await read_until(api.watch(job.name), "succeeded"))[-1].event.succeeded.job
            for job in (batch, realtime)
        ]
        starts = [job.start_time.ToNanoseconds() for job in ends]
        assert starts[1] < starts[0]


async def test_a_worker_takes_what_it_can_run_and_one_job_ahead_that_stays_queued() -> None:
    bus = memory_bus()
    async with (
        running_worker(bus, FakeEngine(hold_after=1, max_batch_size=2)) as worker,
        running_api(bus) as api,
    ):
        jobs = [await api.create(spec(strength=1.0)) for _ in range(4)]
        for job in jobs[:2]:
            await read_until(api.watch(job.name), "step")

        async def one_waits() -> bool:
            return await bus.queue.depth("fake", Lane.REALTIME) == 1

        await eventually(one_waits)
        for job in jobs[2:]:
            assert (await api.get(job.name)).state == job_pb2.Job.STATE_QUEUED
        worker.engine.release()
        for job in jobs:
            await read_until(api.watch(job.name), "succeeded")


@pytest.mark.parametrize(("samples", "guidance_scale"), [(4, 1.0), (2, 7.5)])
async def test_a_worker_counts_forwards_of_which_a_guided_sample_costs_two(
    samples: int, guidance_scale: float
) -> None:
    bus = memory_bus()
    async with (
        running_worker(bus, FakeEngine(hold_after=1, max_batch_size=4)) as worker,
        running_api(bus) as api,
    ):
        large = await api.create(spec(samples=samples, guidance_scale=guidance_scale))
        small = await api.create(spec())
        await read_until(api.watch(large.name), "step")

        async def is_held() -> bool:
            return await bus.queue.depth("fake", Lane.REALTIME) == 0

        await eventually(is_held)
        assert (await api.get(small.name)).state == job_pb2.Job.STATE_QUEUED
        worker.engine.release()
        await read_until(api.watch(small.name), "succeeded")


async def test_the_queue_holds_the_init_image_and_no_parameters() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        job = await api.create(spec(prompt="a lighthouse"))
    delivery = await take(bus)
    assert delivery is not None
    assert (delivery.job.job_id, delivery.job.tenant) == (job.id, "dev")
    assert delivery.job.init_image
    assert "lighthouse" not in repr(delivery.job)


@pytest.mark.parametrize(("temp", "folder"), [(False, "generations"), (True, "temp")])
async def test_base64_files_are_stored_as_text_under_their_own_name(
    temp: bool, folder: str
) -> None:
    bus, blobs = memory_bus(), MemoryBlobStore()
    async with running_worker(bus, blobs=blobs), running_api(bus) as api:
        messages = [m async for m in api.generate(spec(base64=True, temp=temp))]
        url = messages[-1].event.succeeded.job.samples[0].url
        key = url.split("/", 3)[3]
        assert key.startswith(f"{folder}/")
        assert key.endswith("-0.base64")
        text = b"".join([chunk async for chunk in blobs.read(key)])
        assert base64.b64decode(text, validate=True).startswith(b"\x89PNG")


async def test_a_job_whose_image_cannot_be_prepared_began_before_it_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise not_an_image("it is damaged")

    monkeypatch.setattr(decoder, "prepare_image", broken)
    async with running_stack() as stack:
        messages = [message async for message in stack.api.generate(spec())]
    assert kinds(messages)[-2:] == ["started", "failed"]
    error = messages[-1].event.failed.job.error
    assert error.reason == "INIT_IMAGE_INVALID"
    assert error.message == not_an_image("it is damaged").violation.text
