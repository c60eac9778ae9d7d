"""The metric by which workers are scaled: device seconds of jobs that have not ended."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY

import img2img_server.api.estimate as backlog_module
from img2img_server.api.estimate import UNMEASURED_PIXEL_STEP_SECONDS, Backlog
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.queue import QueuedJob
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from img2img_server.worker.deps import Throughput
from tests.stack import kinds, running_api, running_worker, spec

MODEL = replace(FAKE_MODEL, pixel_step_seconds=1e-6)
_ids = itertools.count(1)
SMALL, LARGE = 256 * 256 * 10, 512 * 512 * 20 * 2  # pixel-steps of the two jobs below together


def small(lane: Lane = Lane.REALTIME) -> JobParams:
    return JobParams(
        prompt="p",
        model="fake",
        width=256,
        height=256,
        strength=0.5,
        num_inference_steps=20,
        lane=lane,
    )


def large() -> JobParams:
    return replace(small(), width=512, height=512, strength=1.0, samples=2)


async def announce(bus: Bus, model: ModelInfo = MODEL, name: str = "w") -> None:
    info = WorkerInfo(name=name, model=model, device="cpu")
    await bus.workers.announce(info)


async def put(bus: Bus, backlog: Backlog | None, *jobs: JobParams) -> None:
    for params in jobs:
        job = QueuedJob(job_id=next(_ids), tenant="t", init_image=b"")
        place = await bus.queue.put(job, params.model, params.lane)
        if backlog:
            backlog.note(params, place, MODEL.pixel_steps(params))


async def seconds(backlog: Backlog, state: str, lane: Lane = Lane.REALTIME) -> float:
    return round((await backlog.measure())["fake", lane, state], 6)


def test_the_work_of_a_job_is_its_pixels_times_the_steps_that_run() -> None:
    assert (MODEL.pixel_steps(small()), MODEL.pixel_steps(large())) == (SMALL, LARGE)


async def test_what_waits_is_the_sum_of_what_each_job_costs() -> None:
    bus = memory_bus(queue_limit=100)
    backlog = Backlog(bus.queue, bus.workers)
    await announce(bus)
    await put(bus, backlog, small(), large(), large(), small(Lane.BATCH))
    assert await seconds(backlog, "waiting") == round((SMALL + 2 * LARGE) * 1e-6, 6)
    assert await seconds(backlog, "waiting", Lane.BATCH) == round(SMALL * 1e-6, 6)
    assert await seconds(backlog, "taken") == 0.0


async def test_live_workers_are_counted_by_model_and_a_model_without_one_has_zero() -> None:
    bus = memory_bus(queue_limit=100)
    backlog = Backlog(bus.queue, bus.workers)
    await announce(bus, name="first")
    await announce(bus, name="second")
    await announce(bus, replace(MODEL, name="idle"), name="third")
    await bus.workers.withdraw("third")
    await backlog.measure()
    found = {
        name: REGISTRY.get_sample_value("img2img_workers", {"model": name})
        for name in ("fake", "idle")
    }
    assert found == {"fake": 2.0, "idle": 0.0}


async def test_a_taken_job_moves_over_with_its_own_cost_until_it_has_ended() -> None:
    bus = memory_bus(queue_limit=100)
    backlog = Backlog(bus.queue, bus.workers)
    await announce(bus)
    await put(bus, backlog, large(), small(), small())
    (delivery,) = await bus.queue.pull("fake", (Lane.REALTIME,), 1, 1.0)
    assert await seconds(backlog, "taken") == round(LARGE * 1e-6, 6)
    assert await seconds(backlog, "waiting") == round(2 * SMALL * 1e-6, 6)
    await delivery.ack()
    assert await seconds(backlog, "taken") == 0.0


async def test_jobs_of_another_api_cost_what_those_of_this_one_do() -> None:
    bus = memory_bus(queue_limit=100)
    here, elsewhere = (Backlog(bus.queue, bus.workers) for _ in range(2))
    await announce(bus)
    await put(bus, here, small(), large())
    await put(bus, elsewhere, large(), small())
    both = round(2 * (SMALL + LARGE) * 1e-6, 6)
    assert [await seconds(api, "waiting") for api in (here, elsewhere)] == [both, both]


async def test_an_api_that_saw_no_job_counts_with_the_models_own_request() -> None:
    bus = memory_bus(queue_limit=100)
    await announce(bus)
    await put(bus, None, small(), small())
    default = FAKE_MODEL.native_size**2 * 2  # 4 steps run at strength 0.7
    assert await seconds(Backlog(bus.queue, bus.workers), "waiting") == round(2 * default * 1e-6, 6)


async def test_live_workers_say_how_fast_they_are_and_the_model_remembers_it() -> None:
    bus = memory_bus(queue_limit=100)
    backlog = Backlog(bus.queue, bus.workers)
    await put(bus, backlog, small())
    await announce(bus, FAKE_MODEL)
    assert await seconds(backlog, "waiting") == round(SMALL * UNMEASURED_PIXEL_STEP_SECONDS, 6)
    for name, pace in (("slow", 3e-6), ("fast", 1e-6)):
        await announce(bus, replace(MODEL, pixel_step_seconds=pace), name)
    assert await seconds(backlog, "waiting") == round(SMALL * 2e-6, 6)
    for name in ("w", "slow", "fast"):
        await bus.workers.withdraw(name)
    # The last announced value remains.
    assert await seconds(backlog, "waiting") == round(SMALL * 1e-6, 6)


def test_a_worker_measures_its_device_not_the_time_before_or_between() -> None:
    pace = Throughput()
    pace.add_busy_seconds(100.0, 10.0)  # The worker is compiling.
    for _ in range(10):
        pace.count_step(small())
    pace.add_busy_seconds(102.0, 20.0)
    assert pace.pixel_step_seconds == pytest.approx(2.0 / SMALL)
    assert pace.busy == pytest.approx(0.2)
    for _ in range(1000):
        pace.add_busy_seconds(102.0, 30.0)
    assert pace.busy == 0.0
    pace.add_busy_seconds(104.0, 40.0)
    # The device was busy without finishing a step.
    assert pace.pixel_step_seconds > 2.0 / SMALL


async def test_the_metric_follows_a_job_with_the_pace_that_its_worker_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.api.estimate.REFRESH_SECONDS", 0.01)
    monkeypatch.setattr("img2img_server.worker.worker.ANNOUNCE_SECONDS", 0.01)
    bus = memory_bus(queue_limit=100)
    engine = FakeEngine(step_seconds=0.02, hold_after=6)
    labels = {"model": "fake", "lane": "realtime", "state": "taken"}

    async def reaches(low: float, high: float) -> None:
        async with asyncio.timeout(20):
            while True:
                value = REGISTRY.get_sample_value("img2img_queued_gpu_seconds", labels)
                if value is not None and low <= value <= high:
                    return
                await asyncio.sleep(0.01)

    async with running_worker(bus, engine), running_api(bus) as api:
        call = api.generate(spec(num_inference_steps=10, strength=1.0))
        await reaches(0.15, 0.4)  # 10 steps of 0.02 s; the estimate without a measurement is 0.66 s
        engine.release()
        assert kinds([m async for m in call])[-1] == "succeeded"
        await reaches(0.0, 0.0)


async def test_a_figure_that_cannot_be_measured_does_not_end_the_api(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backlog_module, "REFRESH_SECONDS", 0.001)
    bus = memory_bus()
    await announce(bus)
    backlog = Backlog(bus.queue, bus.workers)
    real, failures = backlog.measure, iter([RuntimeError("of another version"), UnavailableError()])

    async def measure() -> dict[tuple[str, Lane, str], float]:
        for failure in failures:
            raise failure
        measured.set()
        return await real()

    measured = asyncio.Event()
    monkeypatch.setattr(backlog, "measure", measure)
    publishing = asyncio.create_task(backlog.publish())
    async with asyncio.timeout(30):
        await measured.wait()
    publishing.cancel()
