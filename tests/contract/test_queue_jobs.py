"""The work queue, in memory and on JetStream."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest
from fixtures_engines import ACK_WAIT_SECONDS, QUEUE_LIMIT, OpenBus

from img2img_server import clock
from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError
from img2img_server.interfaces.queue import Delivery, LaneLoad, QueuedJob
from img2img_server.nats.bus import Bus

MODEL = "atelier"
LANES = (Lane.REALTIME, Lane.BATCH)
SOON = 0.05  # seconds; long enough to detect a message when none is expected
LONG = 60.0  # seconds; a timeout that no passing test reaches

_ids = itertools.count(10_000_001)
_routes: dict[int, tuple[str, Lane]] = {}  # the position of each job


def a_job(*, tenant: str = "acme", model: str = MODEL, lane: Lane = Lane.REALTIME) -> QueuedJob:
    job = QueuedJob(job_id=next(_ids), tenant=tenant, init_image=b"\xff\xd8image")
    _routes[job.job_id] = model, lane
    return job


async def put(bus: Bus, job: QueuedJob) -> int:
    return await bus.queue.put(job, *_routes[job.job_id])


async def pull(bus: Bus, most: int = 10, seconds: float = SOON) -> list[Delivery]:
    return await bus.queue.pull(MODEL, LANES, most, seconds)


async def pull_one(bus: Bus) -> Delivery:
    (delivery,) = await pull(bus, most=1, seconds=LONG)
    return delivery


def ids(deliveries: list[Delivery]) -> list[int]:
    return [delivery.job.job_id for delivery in deliveries]


async def test_a_job_arrives_as_it_was_put(bus: Bus) -> None:
    job = a_job()
    assert await put(bus, job) > 0
    delivery = await pull_one(bus)
    assert (delivery.job, delivery.attempt) == (job, 1)


async def test_places_grow(bus: Bus) -> None:
    places = [await put(bus, a_job()) for _ in range(3)]
    assert places == sorted(set(places))


async def test_a_waiting_pull_gets_a_job_that_is_put_later(open_bus: OpenBus) -> None:
    async with open_bus() as api, open_bus() as worker, asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(pull_one(worker))
        assert await pull(api) == []  # After this round trip, the other pull waits too.
        job = a_job(lane=Lane.BATCH)
        await put(api, job)
        assert (await waiting).job == job


async def test_a_pull_comes_back_empty_after_its_time(bus: Bus) -> None:
    assert await pull(bus) == []


async def test_realtime_jobs_come_before_batch_jobs(bus: Bus) -> None:
    batch, realtime = a_job(lane=Lane.BATCH), a_job()
    await put(bus, batch)
    await put(bus, realtime)
    assert [(await pull_one(bus)).job, (await pull_one(bus)).job] == [realtime, batch]


async def test_only_the_lanes_that_were_asked_for_are_served(bus: Bus) -> None:
    await put(bus, a_job(lane=Lane.BATCH))
    assert await bus.queue.pull(MODEL, [Lane.REALTIME], 1, SOON) == []


async def test_a_model_gets_its_own_jobs_only(bus: Bus) -> None:
    await put(bus, a_job(model="other"))
    assert await pull(bus) == []


async def test_a_pull_takes_at_most_what_it_asked_for_and_leaves_the_rest(
    open_bus: OpenBus,
) -> None:
    async with open_bus() as one, open_bus() as two:
        jobs = [a_job() for _ in range(3)]
        for job in jobs:
            await put(one, job)
        assert ids(await pull(one, most=2)) == [jobs[0].job_id, jobs[1].job_id]
        assert [(d.job, d.attempt) for d in await pull(two)] == [(jobs[2], 1)]


async def test_no_job_is_taken_twice(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as two:
        jobs = [a_job(lane=lane) for lane in LANES for _ in range(QUEUE_LIMIT)]
        waiting = [asyncio.create_task(pull(bus, 2, LONG)) for bus in (one, two, one)]
        for job in jobs:
            await put(two, job)
        first = [delivery for got in await asyncio.gather(*waiting) for delivery in got]
        await asyncio.gather(*(delivery.ack() for delivery in first))
        taken = ids(first)
        while len(taken) < len(jobs):
            later = await pull(one, seconds=LONG)
            await asyncio.gather(*(delivery.ack() for delivery in later))
            taken += ids(later)
        assert sorted(taken) == [job.job_id for job in jobs]


async def test_a_cancelled_pull_loses_no_job(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as two:
        pulling = asyncio.create_task(pull_one(one))
        assert await pull(two) == []  # After this round trip, the other pull waits too.
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        job = a_job()
        await put(one, job)
        delivery = await pull_one(two)
        assert (delivery.job, delivery.attempt) == (job, 1)


async def test_a_full_tenant_is_refused_and_others_are_not(bus: Bus) -> None:
    for _ in range(QUEUE_LIMIT):
        await put(bus, a_job())
    with pytest.raises(QueueFullError) as refusal:
        await put(bus, a_job())
    assert refusal.value.limit == QUEUE_LIMIT
    await put(bus, a_job(tenant="other"))
    await put(bus, a_job(lane=Lane.BATCH))
    await put(bus, a_job(model="other"))


async def test_taken_jobs_count_until_they_are_done(bus: Bus) -> None:
    for _ in range(QUEUE_LIMIT):
        await put(bus, a_job())
    delivery = await pull_one(bus)
    with pytest.raises(QueueFullError):
        await put(bus, a_job())
    await delivery.ack()
    await put(bus, a_job())


async def test_unfinished_counts_the_jobs_of_one_tenant_in_all_models_and_lanes(bus: Bus) -> None:
    async def counts() -> list[int]:
        return [await bus.queue.unfinished(tenant) for tenant in ("acme", "other", "ac.me", "*")]

    assert await counts() == [0, 0, 0, 0]
    batch = a_job(model="other", lane=Lane.BATCH)
    for job in (a_job(), a_job(), a_job(tenant="other"), a_job(model="other"), batch):
        await put(bus, job)
    assert await counts() == [4, 1, 0, 0]
    delivery = await pull_one(bus)  # A running job counts as unfinished.
    assert await counts() == [4, 1, 0, 0]
    await delivery.ack()
    acme = delivery.job.tenant == "acme"
    assert await counts() == [4 - acme, acme, 0, 0]


async def test_a_job_put_twice_is_queued_once(bus: Bus) -> None:
    job = a_job()
    assert await put(bus, job) == await put(bus, job)
    assert await bus.queue.depth(MODEL, Lane.REALTIME) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("a.b", "a=2Eb"), ("a b", "a_b"), ("*", ">"), ("ä", "a"), ("A", "a"), ("", "=")],
)
async def test_names_that_look_alike_are_kept_apart(bus: Bus, one: str, other: str) -> None:
    put_in = a_job(model=one, tenant=other)
    await put(bus, put_in)
    assert await bus.queue.pull(other, LANES, 1, SOON) == []
    (delivery,) = await bus.queue.pull(one, LANES, 1, LONG)
    assert delivery.job == put_in


async def test_a_job_whose_worker_is_lost_goes_to_another_one(open_bus: OpenBus) -> None:
    async with open_bus() as survivor:
        job = a_job()
        async with open_bus() as lost:
            await put(lost, job)
            assert (await pull_one(lost)).attempt == 1
        delivery = await pull_one(survivor)
        assert (delivery.job, delivery.attempt) == (job, 2)


async def test_a_job_in_progress_stays_with_its_worker(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as two:
        await put(one, a_job())
        delivery = await pull_one(one)
        eager = asyncio.create_task(pull(two, seconds=1.6 * ACK_WAIT_SECONDS))
        while not eager.done():
            await delivery.in_progress()
            await asyncio.wait([eager], timeout=ACK_WAIT_SECONDS / 3)
        assert await eager == []


async def test_a_job_handed_back_comes_again_at_once(bus: Bus) -> None:
    job = a_job()
    await put(bus, job)
    await (await pull_one(bus)).nak()
    (delivery,) = await pull(bus, seconds=ACK_WAIT_SECONDS / 2)
    assert (delivery.job, delivery.attempt) == (job, 2)


@pytest.mark.parametrize("end", ["ack", "term"])
async def test_a_job_that_is_done_does_not_come_again(bus: Bus, end: str) -> None:
    await put(bus, a_job())
    delivery = await pull_one(bus)
    await (delivery.ack() if end == "ack" else delivery.term("no such scheduler"))
    assert await pull(bus, seconds=1.2 * ACK_WAIT_SECONDS) == []
    assert await bus.queue.depth(MODEL, Lane.REALTIME) == 0


async def test_a_late_ack_still_removes_the_job(bus: Bus) -> None:
    await put(bus, a_job())
    first = await pull_one(bus)
    assert (await pull_one(bus)).attempt == 2
    await first.ack()
    assert await pull(bus, seconds=1.2 * ACK_WAIT_SECONDS) == []


async def test_a_withdrawn_job_is_not_delivered(bus: Bus) -> None:
    withdrawn, kept = a_job(), a_job()
    place = await put(bus, withdrawn)
    await put(bus, kept)
    assert await bus.queue.remove(place)
    assert ids(await pull(bus, seconds=LONG)) == [kept.job_id]


async def test_withdrawing_what_is_gone_says_so(bus: Bus) -> None:
    place = await put(bus, a_job())
    await (await pull_one(bus)).ack()
    assert not await bus.queue.remove(place)
    assert not await bus.queue.remove(place + 1000)


async def test_a_withdrawn_job_that_was_taken_does_not_come_again(bus: Bus) -> None:
    place = await put(bus, a_job())
    delivery = await pull_one(bus)
    assert await bus.queue.remove(place)
    await delivery.nak()
    assert await pull(bus, seconds=1.2 * ACK_WAIT_SECONDS) == []


async def test_the_next_job_before_a_time_is_found_by_its_place(bus: Bus) -> None:
    jobs = [a_job(), a_job(tenant="other", lane=Lane.BATCH)]
    first, second = [await put(bus, job) for job in jobs]
    await pull_one(bus)  # A job that was taken counts too.
    soon = clock.now() + 60
    assert await bus.queue.next_before(soon) == (first, jobs[0].without_image())
    assert await bus.queue.next_before(soon, first) == (second, jobs[1].without_image())
    assert await bus.queue.next_before(soon, second) is None
    assert await bus.queue.next_before(soon - 120) is None


async def test_position_and_depth_count_what_waits(open_bus: OpenBus) -> None:
    async with open_bus() as bus:
        places = [await put(bus, a_job()) for _ in range(3)]
        assert [await bus.queue.position(MODEL, Lane.REALTIME, p) for p in places] == [0, 1, 2]
        assert await bus.queue.depth(MODEL, Lane.REALTIME) == 3
        await pull_one(bus)
    async with open_bus() as bus:
        # Numbers may be cached for a moment, so a new connection reads them.
        assert [await bus.queue.position(MODEL, Lane.REALTIME, p) for p in places] == [0, 0, 1]
        assert await bus.queue.depth(MODEL, Lane.REALTIME) == 2
        assert await bus.queue.depth(MODEL, Lane.BATCH) == 0


async def test_the_load_of_a_lane_tells_what_waits_and_what_was_taken(open_bus: OpenBus) -> None:
    async def load() -> LaneLoad:
        async with open_bus() as bus:
            # Numbers may be cached for a moment, so a new connection reads them.
            return await bus.queue.load(MODEL, Lane.BATCH)

    assert await load() == LaneLoad(waiting=0, taken=0, last_taken=0)
    async with open_bus() as worker:
        places = [await put(worker, a_job(lane=Lane.BATCH)) for _ in range(3)]
        assert await load() == LaneLoad(waiting=3, taken=0, last_taken=0)
        taken = await pull(worker, most=2, seconds=LONG)
        assert await load() == LaneLoad(waiting=1, taken=2, last_taken=places[1])
        await taken[0].ack()
        await taken[1].nak()  # The job was requeued, so it has not ended.
        assert await load() == LaneLoad(waiting=1, taken=1, last_taken=places[1])


async def test_large_jobs_travel(bus: Bus) -> None:
    job = replace(a_job(), init_image=bytes(range(256)) * 4096)
    await put(bus, job)
    assert (await pull_one(bus)).job == job
