"""A worker that stops hands its running jobs over: another worker continues with the next step."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_server.api.cancel import Canceller
from img2img_server.domain.events import StepFinished
from img2img_server.domain.models import WorkerInfo
from img2img_server.domain.params import JobParams
from img2img_server.engine.base import RESTARTED_WARNING, EngineEvent, EngineJob, Sink
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.imaging.base import Pixels
from img2img_server.nats import subjects
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.nats.connection import connect
from img2img_server.settings import Settings
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from img2img_server.testing.memory_states import MemoryStates
from img2img_server.worker import execution, lease, states
from img2img_server.worker.handover import LOOK_SECONDS
from tests.engine_bench import load
from tests.stack import (
    WAIT_SECONDS,
    Api,
    RunningWorker,
    read_until,
    running_api,
    running_worker,
    settings,
    spec,
)
from tests.tiny_models import write_sd

NO_TIME = settings(drain_seconds=0.0)
LONG_DRAIN = settings(drain_seconds=60.0)
STEPS = 8
LONG = {"strength": 1.0, "num_inference_steps": STEPS, "output_format": job_pb2.IMAGE_FORMAT_PNG}


@dataclass
class Seen:
    """A job's stream of events."""

    call: Any
    messages: list[Any] = field(default_factory=list)

    async def to_step(self, step: int) -> None:
        """Reads until the last sample has taken this step."""
        while step not in [number for _, number in self.steps]:
            await read_until(self.call, "step", self.messages)

    @property
    def job_id(self) -> int:
        return int(self.messages[0].event.job.split("/")[1])

    async def to_end(self) -> job_pb2.Job:
        self.messages += [message async for message in self.call]
        numbers = [message.event.sequence for message in self.messages]
        assert numbers == list(range(len(numbers)))
        job: job_pb2.Job = self.messages[-1].event.succeeded.job
        return job

    @property
    def steps(self) -> list[tuple[int, int]]:
        steps = [m.event.step for m in self.messages if m.event.HasField("step")]
        return [(step.sample, step.step) for step in steps]

    @property
    def starts(self) -> list[tuple[str, int, list[int]]]:
        """Worker, attempt and done steps of each start."""
        starts = [m.event.started for m in self.messages if m.event.HasField("started")]
        return [(start.worker, start.attempt, list(start.done_steps)) for start in starts]


def generate(api: Api, **changes: Any) -> Seen:
    return Seen(api.generate(spec(**LONG | changes)))


def hashes(job: job_pb2.Job) -> list[str]:
    found = [sample.sha256 for sample in job.samples]
    assert all(found)
    return found


async def calm(bus: Bus, api: Api, **changes: Any) -> list[str]:
    """Returns the images of a job that no worker left."""
    async with running_worker(bus):
        return hashes(await generate(api, **changes).to_end())


async def suspended(bus: Bus, api: Api, step: int, **changes: Any) -> Seen:
    """Starts a job whose worker stops after a step."""
    engine = FakeEngine(hold_after=step)
    async with running_worker(bus, engine, name="old", config=NO_TIME) as old:
        seen = generate(api, **changes)
        await seen.to_step(step)
        await old.drained()
    return seen


def states_of(bus: Bus) -> dict[str, bytes]:
    assert isinstance(bus.states, MemoryStates)
    return bus.states.stored


def every_step_once(samples: int = 1) -> list[tuple[int, int]]:
    return [(sample, step) for sample in range(samples) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("samples", [1, 2])
async def test_another_worker_continues_with_the_next_step_in_the_same_attempt(
    samples: int,
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        expected = await calm(bus, api, samples=samples)
        seen = await suspended(bus, api, 3, samples=samples)
        assert len(states_of(bus)) == 1
        async with running_worker(bus, name="heir"):
            job = await seen.to_end()
    assert seen.starts == [("old", 1, []), ("heir", 1, [3] * samples)]
    assert sorted(seen.steps) == every_step_once(samples)
    assert (job.worker, job.attempt, job.warning) == ("heir", 1, "")
    assert hashes(job) == expected
    assert states_of(bus) == {}


def prepare_late(patch: pytest.MonkeyPatch) -> None:
    """Makes workers prepare init images only after the end of the job was requested."""
    prepare = execution.JobExecution._prepare

    async def late(run: execution.JobExecution, params: JobParams) -> Pixels:
        await run._leaving.wait()
        return await prepare(run, params)

    patch.setattr(execution.JobExecution, "_prepare", late)


class HoldingEngine(FakeEngine):
    """Runs no step. `submitted` is set when it has a job."""

    def __init__(self) -> None:
        super().__init__(hold_after=0)
        self.submitted = asyncio.Event()

    def submit(self, job: EngineJob, sink: Sink) -> None:
        super().submit(job, sink)
        self.submitted.set()


@pytest.mark.parametrize("is_submitted", [True, False])
async def test_a_job_that_is_handed_back_before_its_next_step_keeps_its_steps(
    is_submitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        expected = await calm(bus, api)
        seen = await suspended(bus, api, 3)
        held = HoldingEngine()
        with monkeypatch.context() as patch:
            if not is_submitted:
                prepare_late(patch)
            async with running_worker(bus, held, name="brief", config=NO_TIME) as brief:
                await read_until(seen.call, "started", seen.messages)
                if is_submitted:
                    await held.submitted.wait()
                await brief.drained()
        assert len(states_of(bus)) == 1
        async with running_worker(bus, name="heir"):
            job = await seen.to_end()
    assert seen.starts == [("old", 1, []), ("brief", 1, [3]), ("heir", 1, [3])]
    assert seen.steps == every_step_once()
    assert (job.attempt, job.warning, hashes(job)) == (1, "", expected)
    assert states_of(bus) == {}


async def test_a_resumed_job_that_is_cancelled_while_its_image_is_prepared_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        prepare_late(monkeypatch)
        async with running_worker(bus, name="heir"):
            await read_until(seen.call, "started", seen.messages)
            await api.cancel(seen.messages[0].event.job)
            await seen.to_end()
    assert seen.messages[-1].event.HasField("cancelled")
    assert states_of(bus) == {}


async def test_the_times_of_both_workers_add_up_to_the_total() -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        async with running_worker(bus, FakeEngine(step_seconds=0.02), name="heir"):
            job = await seen.to_end()
        record = await bus.jobs.get("dev", int(job.name.split("/")[1]))
    assert record
    seconds = record.job.timings.seconds
    total = seconds.pop("total")
    del seconds["engine"]
    assert sum(seconds.values()) == pytest.approx(total, rel=0.02, abs=0.01)
    assert record.job.timings.steps == STEPS
    assert record.job.timings.denoise >= 0.02 * 4


async def test_a_worker_that_drains_gives_its_job_to_a_worker_that_becomes_free() -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        expected = await calm(bus, api)
        engine = FakeEngine(hold_after=2)
        async with running_worker(bus, engine, name="old", config=LONG_DRAIN) as old:
            seen = generate(api)
            await seen.to_step(2)
            old.stop.set()
            async with running_worker(bus, name="heir"):
                job = await seen.to_end()
                await old.task
    assert seen.starts == [("old", 1, []), ("heir", 1, [2])]
    assert (seen.steps, hashes(job)) == (every_step_once(), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"begun_jobs": 1},
        {"held_jobs": 1},
        {"draining": True},
        {"store_trouble": "refused"},
        {"state_key": "another"},
        {"name": "old"},
        {"model": replace(FAKE_MODEL, name="another")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_only_an_idle_worker_of_the_same_kind_gets_a_job(changes: dict[str, Any]) -> None:
    old = WorkerInfo(name="old", model=FAKE_MODEL, device="cpu", state_key="key")
    new = replace(old, name="new")
    assert new.can_continue(old)
    assert not replace(new, **changes).can_continue(old)


def test_workers_with_unknown_keys_do_not_continue_each_others_jobs() -> None:
    old = WorkerInfo(name="old", model=FAKE_MODEL, device="cpu", state_key="")
    assert not replace(old, name="new").can_continue(old)


async def test_without_another_worker_a_draining_worker_finishes_its_job() -> None:
    bus = memory_bus()
    engine = FakeEngine(hold_after=2)
    async with running_api(bus) as api, running_worker(bus, engine, name="old") as old:
        seen = generate(api)
        await seen.to_step(2)
        old.stop.set()
        engine.release()
        job = await seen.to_end()
        await old.task
    assert (job.worker, len(seen.starts), seen.steps) == ("old", 1, every_step_once())


async def test_a_killed_worker_that_is_still_announced_gets_no_job() -> None:
    bus = memory_bus()
    engine = FakeEngine(hold_after=2)
    async with running_api(bus) as api, running_worker(bus, engine, name="old") as old:
        seen = generate(api)
        await seen.to_step(2)
        (own,) = await bus.workers.workers()
        await bus.workers.announce(replace(own, name="killed", begun_jobs=0))
        looked = asyncio.Event()
        read = bus.workers.workers

        async def workers() -> list[WorkerInfo]:
            looked.set()
            return await read()

        bus.workers.workers = workers  # type: ignore[method-assign]
        old.stop.set()
        with suppress(TimeoutError):  # It does not look, because no worker asked for a job.
            async with asyncio.timeout(3 * LOOK_SECONDS):
                await looked.wait()
        engine.release()
        job = await seen.to_end()
        await old.task
    assert (job.worker, len(seen.starts), seen.steps) == ("old", 1, every_step_once())


def damaged(bus: Bus) -> None:
    states_of(bus).update({key: data[:-1] + b"?" for key, data in states_of(bus).items()})


def expired(bus: Bus) -> None:
    states_of(bus).clear()


@pytest.mark.parametrize("spoil", [damaged, expired])
async def test_a_job_whose_state_is_lost_starts_again_and_says_so(
    spoil: Callable[[Bus], None],
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        expected = await calm(bus, api)
        seen = await suspended(bus, api, 3)
        spoil(bus)
        async with running_worker(bus, name="heir"):
            job = await seen.to_end()
        record = await bus.jobs.get("dev", int(job.name.split("/")[1]))
    assert seen.starts == [("old", 1, []), ("heir", 2, [])]
    assert (job.warning, hashes(job)) == (RESTARTED_WARNING, expected)
    assert record
    assert record.job.handed_back == 1  # The attempt does not count.
    assert states_of(bus) == {}


async def test_another_kind_of_worker_leaves_the_job_to_others_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    other = FakeEngine(state_key="another device")
    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        monkeypatch.setattr(states, "OTHERS_SECONDS", 60.0)
        async with running_worker(bus, other, name="other"), running_worker(bus, name="heir"):
            await seen.to_end()
        assert seen.starts[1:] == [("heir", 1, [3])]
        seen = await suspended(bus, api, 3)
        monkeypatch.setattr(states, "OTHERS_SECONDS", 0.1)
        other = FakeEngine(state_key="another device")
        async with running_worker(bus, other, name="other"):
            job = await seen.to_end()
    assert seen.starts[1:] == [("other", 2, [])]
    assert job.warning == RESTARTED_WARNING


async def test_many_deliveries_to_another_kind_of_worker_do_not_fail_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    queue: Any = bus.queue
    give_back, requeued = queue.give_back, asyncio.Semaphore(0)

    def noted(message: Any) -> None:
        give_back(message)
        requeued.release()

    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        monkeypatch.setattr(states, "OTHERS_SECONDS", 60.0)
        monkeypatch.setattr(execution, "OTHERS_PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(lease, "DELIVERIES_OF_AN_ATTEMPT", 1)
        monkeypatch.setattr(queue, "give_back", noted)
        other = FakeEngine(state_key="another device")
        async with running_worker(bus, other, name="other"):
            async with asyncio.timeout(WAIT_SECONDS):
                for _ in range(2 * settings().max_attempts):
                    await requeued.acquire()
            async with running_worker(bus, name="heir"):
                job = await seen.to_end()
    assert seen.starts[1:] == [("heir", 1, [3])]
    assert (job.state, job.warning) == (job_pb2.Job.STATE_SUCCEEDED, "")


async def test_a_state_without_room_starts_the_job_again_as_before() -> None:
    bus = dataclasses.replace(memory_bus(ack_wait_seconds=60.0), states=MemoryStates(most_bytes=9))
    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        async with running_worker(bus, name="heir"):
            job = await seen.to_end()
    assert seen.starts == [("old", 1, []), ("heir", 2, [])]
    assert (job.state, job.warning) == (job_pb2.Job.STATE_SUCCEEDED, "")


async def cancel(bus: Bus, job_id: int) -> None:
    await Canceller(bus).cancel("dev", job_id)


async def clear(bus: Bus, job_id: int) -> None:
    assert await Canceller(bus).clear("dev") == 1


@pytest.mark.parametrize(("end", "event"), [(cancel, "cancelled"), (clear, "failed")])
async def test_a_suspended_job_that_ends_in_the_queue_leaves_no_state(
    end: Callable[[Bus, int], Awaitable[None]], event: str
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        await end(bus, seen.job_id)
        await seen.to_end()
        assert states_of(bus) == {}
        async with running_worker(bus, name="heir"):
            pass
    assert seen.messages[-1].event.HasField(event)
    assert len(seen.starts) == 1


@pytest.mark.parametrize(
    ("changes", "event"),
    [({"cancel_requested": True}, "cancelled"), ({"attempt": 100}, "failed")],
    ids=["cancelled", "failed"],
)
async def test_a_suspended_job_that_a_worker_ends_leaves_no_state(
    changes: dict[str, Any], event: str
) -> None:
    bus = memory_bus(ack_wait_seconds=60.0)
    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        stored = await bus.jobs.get("dev", seen.job_id)
        assert stored
        await bus.jobs.update(replace(stored.job, **changes), stored.revision)
        async with running_worker(bus, name="heir"):
            await seen.to_end()
    assert seen.messages[-1].event.HasField(event)
    assert states_of(bus) == {}


async def test_a_job_that_ends_while_its_state_is_stored_leaves_no_state() -> None:
    class CancelledMeanwhile(MemoryStates):
        async def save(self, job_id: int, data: bytes) -> str:
            key = await super().save(job_id, data)
            await bus.workers.withdraw("old")  # So the job is cancelled at once.
            await cancel(bus, job_id)
            return key

    bus = dataclasses.replace(memory_bus(ack_wait_seconds=60.0), states=CancelledMeanwhile())
    async with running_api(bus) as api:
        seen = await suspended(bus, api, 3)
        await seen.to_end()
    assert seen.messages[-1].event.HasField("cancelled")
    assert states_of(bus) == {}


class HeldEngine(DiffusionEngine):
    """A real engine whose jobs wait after a step until they are suspended."""

    hold_after = 0
    is_suspended = threading.Event()

    def submit(self, job: EngineJob, sink: Sink) -> None:
        def held(event: EngineEvent) -> None:
            sink(event)
            if isinstance(event, StepFinished) and event.step == self.hold_after:
                assert self.is_suspended.wait(WAIT_SECONDS)

        super().submit(job, held)

    def suspend(self, job_id: int) -> None:
        super().suspend(job_id)
        self.is_suspended.set()


@asynccontextmanager
async def real_worker(
    bus: Bus, folder: Path, name: str, hold_after: int = 0, **options: Any
) -> AsyncIterator[RunningWorker]:
    info = ModelSpec(source="", name=FAKE_MODEL.name, max_num_inference_steps=100)
    engine = HeldEngine(load(folder), info, 8)
    engine.hold_after, engine.is_suspended = hold_after, threading.Event()
    async with running_worker(bus, engine, name=name, **options) as worker:
        yield worker


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_a"])
async def test_two_real_workers_share_the_steps_of_one_job_on_jetstream(
    scheduler: str, engine_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    config, folder = engine_settings(), write_sd(tmp_path)
    async with (
        connect_bus(config) as bus,
        connect_bus(config) as other,
        running_api(bus) as api,
    ):
        async with real_worker(bus, folder, "calm"):
            expected = hashes(await generate(api, scheduler=scheduler).to_end())
        async with real_worker(bus, folder, "old", 3, config=LONG_DRAIN) as old:
            seen = generate(api, scheduler=scheduler)
            await seen.to_step(3)
            old.stop.set()  # as SIGTERM does
            async with real_worker(other, folder, "heir"):
                job = await seen.to_end()
                await old.task
        async with connect([config.nats_url.get_secret_value()]) as link:
            left = (await link.js.stream_info(subjects.STATES)).state.messages
    assert seen.starts == [("old", 1, []), ("heir", 1, [3])]
    assert seen.steps == every_step_once()
    assert (job.worker, job.attempt, job.warning) == ("heir", 1, "")
    assert job.timings.steps == STEPS
    assert hashes(job) == expected
    assert left == 0
