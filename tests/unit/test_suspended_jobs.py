"""The record of a suspended job, and the workers that may write it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from img2img_server.domain.events import Failed, Queued, SampleStored, Started
from img2img_server.domain.job import (
    IllegalTransitionError,
    Job,
    State,
    Suspended,
    Timings,
    advance,
)
from img2img_server.domain.params import JobParams
from img2img_server.interfaces.queue import OwnershipLostError, QueuedJob
from img2img_server.nats.bus import Bus
from img2img_server.testing.bus import memory_bus
from img2img_server.worker.lease import (
    DELIVERIES_OF_AN_ATTEMPT,
    JobLease,
    counted_attempts,
)

STATE = Suspended(key="k", size=1, sha256="", state_key="s", time=120.0, done_steps=(3,))
NEW = Job(
    id=1,
    tenant="t",
    params=JobParams(prompt="a cup"),
    file_prefix="f",
    future_urls=("u",),
    create_time=100.0,
)


def started(attempt: int, worker: str = "w", pulled_time: float = 0.0) -> Started:
    return Started(worker=worker, model="m", attempt=attempt, pulled_time=pulled_time)


def suspended_job() -> Job:
    job = advance(NEW, started(1, "old", 110.0), 111.0)
    job = replace(job, suspended=STATE, timings=replace(job.timings, denoise=8.0))
    return advance(job, Queued(), 121.0)


def test_a_job_that_continues_stays_in_its_attempt_and_keeps_its_times() -> None:
    waiting = suspended_job()
    assert (waiting.state, waiting.handed_back, counted_attempts(waiting)) == (State.QUEUED, 0, 0)
    job = advance(waiting, started(1, "new", 125.0), 126.0)
    assert (job.state, job.worker, job.attempt, job.resumes) == (State.RUNNING, "new", 1, 1)
    assert (job.start_time, job.suspended, counted_attempts(job)) == (111.0, None, 1)
    assert job.timings == Timings(queue=10.0 + 5.0, denoise=8.0)


def test_a_job_whose_state_is_not_used_loses_the_attempt_and_its_times() -> None:
    job = advance(suspended_job(), started(2, "new", 125.0), 126.0)
    assert (job.attempt, job.handed_back, job.resumes, job.suspended) == (2, 1, 0, None)
    assert counted_attempts(job) == 1
    assert (job.start_time, job.timings) == (126.0, Timings(queue=25.0))


def lease(bus: Bus, stored: Any, writer: Any, name: str, deliveries: int = 1) -> JobLease:
    deps: Any = SimpleNamespace(
        name=name,
        engine=SimpleNamespace(model=SimpleNamespace(name="m")),
        jobs=bus.jobs,
        outbox=bus.outbox,
        states=bus.states,
        max_attempts=3,
    )

    async def end(*_: str) -> None: ...

    message = QueuedJob(job_id=1, tenant="t", init_image=b"")
    delivery: Any = SimpleNamespace(job=message, attempt=deliveries, nak=end, ack=end, term=end)
    return JobLease(deps, delivery, stored, writer, 0.0)


async def test_after_the_hand_over_only_the_new_worker_can_write() -> None:
    bus = memory_bus()
    await bus.jobs.create(NEW)

    async def opened(name: str) -> JobLease:
        return lease(bus, await bus.jobs.get("t", 1), await bus.events.open(1), name)

    old = await opened("old")
    assert await old.take(cancelled=False)
    await old.append_started()
    # The old worker is frozen here: its copy of the lease does not know what happens next.
    frozen = await opened("old")
    frozen.job, frozen._revision = old.job, old._revision
    await old.hand_back("worker stopped", STATE, old.job.timings)
    new, late = await opened("new"), await opened("late")
    for each in (new, late):
        each.resume(STATE.done_steps)
    assert await new.take(cancelled=False)
    with pytest.raises((OwnershipLostError, IllegalTransitionError)):
        await late.take(cancelled=False)
    new._writer = await bus.events.open(1)
    await new.append_started()

    stored = SampleStored(sample=0, url="u", sha256="", size_bytes=1)
    with pytest.raises(OwnershipLostError):
        await frozen.finish(Failed(reason="R", message="m"))
    with pytest.raises(OwnershipLostError):
        await frozen.hand_back("worker stopped", STATE)
    for other in (frozen, old, late):
        with pytest.raises(OwnershipLostError):
            await other.append(stored)
    record = await bus.jobs.get("t", 1)
    assert record
    assert (record.job.worker, record.job.attempt, record.job.state) == ("new", 1, State.RUNNING)


async def test_a_job_that_is_suspended_again_and_again_needs_no_further_attempts() -> None:
    job = NEW
    for number in range(20):
        job = advance(job, started(1, f"w{number}"), 111.0 + number)
        assert counted_attempts(job) == 1
        job = advance(replace(job, suspended=STATE), Queued(), 112.0 + number)
    assert (job.attempt, job.handed_back, job.resumes) == (1, 0, 19)


@pytest.mark.parametrize(("further", "has_ended"), [(0, False), (1, True)])
async def test_only_deliveries_that_no_worker_left_to_others_exhaust_a_suspended_job(
    further: int, has_ended: bool
) -> None:
    bus = memory_bus()
    await bus.jobs.create(suspended_job())

    async def opened(deliveries: int) -> JobLease:
        stored, writer = await bus.jobs.get("t", 1), await bus.events.open(1)
        return lease(bus, stored, writer, "w", deliveries)

    left = 2 * 3 * DELIVERIES_OF_AN_ATTEMPT
    for number in range(left):
        other = await opened(2 + number)  # The first delivery ended when the job was suspended.
        assert not await other.settle(cancelled=False)
        await other.exclude_delivery()
    # These deliveries ended before an attempt began, as if the job had ended its workers.
    broken = 3 * DELIVERIES_OF_AN_ATTEMPT + further
    last = await opened(1 + left + broken)
    assert await last.settle(cancelled=False) is has_ended
    record = await bus.jobs.get("t", 1)
    assert record
    assert record.job.uncounted_deliveries == left
    reason = record.job.failure.reason if record.job.failure else ""
    assert reason == ("ATTEMPTS_EXHAUSTED" if has_ended else "")


async def test_a_cancel_request_is_kept_while_a_worker_leaves_the_job_to_others() -> None:
    bus = memory_bus()
    await bus.jobs.create(suspended_job())
    stored = await bus.jobs.get("t", 1)
    assert stored
    other = lease(bus, stored, await bus.events.open(1), "w", 2)
    await bus.jobs.update(replace(stored.job, cancel_requested=True), stored.revision)
    await other.exclude_delivery()
    record = await bus.jobs.get("t", 1)
    assert record
    assert record.job.cancel_requested
