"""Estimates follow the work of a job and the order in which workers pull."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from img2img_server import clock
from img2img_server.api.estimate import Estimator
from img2img_server.domain.job import Job, State
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.interfaces.queue import QueuedJob, size_of
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL

PARAMS = JobParams(prompt="p", model="fake", strength=1.0, num_inference_steps=8)
LONG = replace(PARAMS, num_inference_steps=80)
SECONDS = 0.1  # of one forward at 512x512
OWN = 8 * SECONDS
_ids = itertools.count(1)


async def announce(bus: Bus, workers: int = 1, batch: float = 1.0) -> None:
    """Announces workers. `batch`: the number of jobs that share a batch."""
    for number in range(workers):
        await bus.workers.announce(
            WorkerInfo(
                name=f"w{number}",
                model=FAKE_MODEL,
                device="cpu",
                job_seconds=1.0,
                forward_seconds=SECONDS / batch,
                job_forward_seconds=SECONDS,
            )
        )


async def test_a_model_that_no_worker_has_loaded_is_loaded_first(
    bus: Bus, estimator: Estimator
) -> None:
    cold = WorkerInfo(
        name="cold",
        model=FAKE_MODEL,
        device="cpu",
        job_seconds=1.0,
        forward_seconds=SECONDS,
        job_forward_seconds=SECONDS,
        model_state=ModelState.COLD,
        load_seconds=20.0,
    )
    await bus.workers.announce(cold)
    await bus.workers.announce(replace(cold, name="slow", load_seconds=50.0))
    assert await estimate(estimator) == (0, 20 + OWN)
    await announce(bus)  # A worker that has loaded it takes the job at once.
    assert await estimate(estimator) == (0, OWN)


async def put(bus: Bus, params: JobParams, tenant: str = "a") -> int:
    job = QueuedJob(job_id=next(_ids), tenant=tenant, init_image=b"")
    return await bus.queue.put(job, "fake", params.lane, size_of(FAKE_MODEL.work(params)))


async def estimate(
    estimator: Estimator, params: JobParams = PARAMS, tenant: str = "a"
) -> tuple[int, float]:
    position, seconds, _ = await estimator.new_job(params, tenant, FAKE_MODEL)
    assert seconds is not None
    return position, round(seconds, 6)


@pytest.fixture
def bus() -> Bus:
    return memory_bus(queue_limit=100)


@pytest.fixture
def estimator(bus: Bus) -> Estimator:
    return Estimator(bus.queue, bus.workers)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 1),
        ({"num_inference_steps": 16}, 2),
        ({"strength": 0.5}, 0.5),
        ({"width": 1024, "height": 1024}, 4),
        ({"samples": 3}, 3),
        ({"guidance_scale": 7.5}, 2),
        ({"scheduler": "heun"}, 15 / 8),
    ],
)
async def test_an_estimate_follows_the_work_of_the_job(
    bus: Bus, estimator: Estimator, changes: dict[str, object], factor: float
) -> None:
    await announce(bus)
    found = await estimate(estimator, replace(PARAMS, **changes))  # type: ignore[arg-type]
    assert found == (0, round(factor * OWN, 6))


@pytest.mark.parametrize("workers", [1, 2, 4])
async def test_equal_jobs_wait_for_those_before_them_on_all_workers(
    bus: Bus, estimator: Estimator, workers: int
) -> None:
    await announce(bus, workers)
    for place in range(8):
        expected = (place, round(OWN + place * OWN / workers, 6))
        assert await estimate(estimator) == expected
        await put(bus, PARAMS)


async def test_jobs_that_share_batches_wait_less(bus: Bus, estimator: Estimator) -> None:
    await announce(bus, batch=8)
    await estimate(estimator)
    for _ in range(8):
        await put(bus, PARAMS)
    assert await estimate(estimator) == (8, 2 * OWN)


async def test_the_jobs_before_a_job_count_with_their_work(bus: Bus, estimator: Estimator) -> None:
    await announce(bus)
    await estimate(estimator, LONG)
    await put(bus, LONG)
    assert await estimate(estimator, LONG) == (1, 20 * OWN)
    assert await estimate(estimator) == (0, OWN)  # Shorter jobs of a tenant go first.


async def test_a_job_does_not_wait_for_the_queue_of_another_tenant(
    bus: Bus, estimator: Estimator
) -> None:
    await announce(bus)
    await estimate(estimator)
    for _ in range(6):
        await put(bus, PARAMS, "a")
    assert await estimate(estimator, tenant="b") == (0, OWN)
    await put(bus, PARAMS, "b")
    assert await estimate(estimator, tenant="b") == (2, round(3 * OWN, 6))  # one of each


async def test_batch_jobs_wait_for_realtime_jobs_and_not_the_other_way_round(
    bus: Bus, estimator: Estimator
) -> None:
    await announce(bus)
    batch = replace(PARAMS, lane=Lane.BATCH)
    await estimate(estimator)
    await put(bus, PARAMS, "a")
    await put(bus, batch, "b")
    assert await estimate(estimator, batch, "c") == (1, 2 * OWN)
    assert await estimate(estimator, PARAMS, "c") == (0, OWN)


async def test_a_queued_job_moves_up(bus: Bus, estimator: Estimator) -> None:
    await announce(bus)
    await estimate(estimator)
    places = [await put(bus, PARAMS) for _ in range(3)]
    job = Job(
        id=1,
        tenant="a",
        params=PARAMS,
        file_prefix="",
        future_urls=(),
        create_time=0.0,
        queue_sequence=places[2],
    )
    assert await estimator.job(job) == pytest.approx(3 * OWN)
    (delivery,) = await bus.queue.pull("fake", [Lane.REALTIME], 1, 1.0)
    assert await estimator.job(job) == pytest.approx(2.5 * OWN)  # half of the running job is left
    await delivery.ack()
    assert await estimator.job(job) == pytest.approx(2 * OWN)
    running = replace(job, state=State.RUNNING, start_time=clock.now() - 0.5 * OWN)
    assert await estimator.job(running) == pytest.approx(0.5 * OWN, abs=0.05)
    assert await estimator.job(replace(job, state=State.SUCCEEDED)) is None


async def test_without_a_worker_there_is_no_estimate(bus: Bus, estimator: Estimator) -> None:
    position, seconds, wait = await estimator.new_job(PARAMS, "a", FAKE_MODEL)
    assert (position, seconds, wait) == (0, None, 0.0)


async def test_workers_that_drain_serve_no_further_job(bus: Bus, estimator: Estimator) -> None:
    await announce(bus)
    (worker,) = await bus.workers.workers()
    await bus.workers.announce(replace(worker, draining=True))
    assert (await estimator.new_job(PARAMS, "a", FAKE_MODEL))[1] is None


async def test_jobs_that_a_worker_holds_count_as_waiting(bus: Bus, estimator: Estimator) -> None:
    for _ in range(3):
        await put(bus, PARAMS)
    await announce(bus)
    assert (await estimator.backlog())[0] == 3
    # The worker has begun one job and holds another.
    assert len(await bus.queue.pull("fake", [Lane.REALTIME], 2, 1.0)) == 2
    (worker,) = await bus.workers.workers()
    await bus.workers.announce(replace(worker, held_jobs=1))
    assert (await estimator.backlog())[0] == 2
