"""Job records, idempotency keys, workers and models, in memory and on JetStream."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from fixtures_engines import OpenBus

from img2img_server.api.records import page_of
from img2img_server.domain.job import (
    FIRST_JOB_ID,
    LAST_JOB_ID,
    Determinism,
    Job,
    JobFailure,
    SampleResult,
    State,
    Timings,
)
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import ImageFormat, JobParams, Lane
from img2img_server.interfaces.records import ConflictError, Stored
from img2img_server.nats.bus import Bus

TENANT = "acme"


def a_job(job_id: int = FIRST_JOB_ID, tenant: str = TENANT) -> Job:
    return Job(
        id=job_id,
        tenant=tenant,
        params=JobParams(prompt="ein Leuchtturm bei Nacht, 灯台", seed=7),
        file_prefix="5f0c",
        future_urls=("https://pictures.example/5f0c-0.png",),
        create_time=1_700_000_000.25,
    )


def a_full_job() -> Job:
    return replace(
        a_job(),
        params=JobParams(
            prompt="p",
            num_inference_steps=4,
            guidance_scale=1.5,
            output_format=ImageFormat.WEBP,
            lane=Lane.BATCH,
        ),
        state=State.FAILED,
        samples=(SampleResult(index=0, seed=7, url="u", sha256="00", size_bytes=3, nsfw=True),),
        failure=JobFailure(reason="OUT_OF_MEMORY", message="too large", retryable=True),
        timings=Timings(queue=0.5, steps=3),
        determinism=Determinism.EXACT,
        cancel_requested=True,
        queue_sequence=12,
    )


def a_worker(name: str, model: str = "atelier") -> WorkerInfo:
    info = ModelInfo(
        name=model,
        family="sd15",
        schedulers=("euler", "ddim"),
        default_num_inference_steps=20,
        default_guidance_scale=7.5,
    )
    return WorkerInfo(name=name, model=info, device="cpu", job_seconds=1.5)


async def test_ids_grow_and_are_never_drawn_twice(open_bus: OpenBus) -> None:
    async with open_bus() as bus:
        first = [await bus.jobs.next_id(TENANT) for _ in range(3)]
    async with open_bus() as bus:
        at_once = await asyncio.gather(*(bus.jobs.next_id(TENANT) for _ in range(5)))
    assert first + sorted(at_once) == list(range(FIRST_JOB_ID, FIRST_JOB_ID + 8))


async def test_a_record_comes_back_as_it_was_stored(bus: Bus) -> None:
    revision = await bus.jobs.create(a_full_job())
    assert await bus.jobs.get(TENANT, FIRST_JOB_ID) == Stored(a_full_job(), revision)


async def test_there_is_no_record_of_another_tenant_or_id(bus: Bus) -> None:
    await bus.jobs.create(a_job())
    assert await bus.jobs.get("other", FIRST_JOB_ID) is None
    assert await bus.jobs.get(TENANT, FIRST_JOB_ID + 1) is None


async def test_a_record_is_created_once(bus: Bus) -> None:
    await bus.jobs.create(a_job())
    with pytest.raises(ConflictError):
        await bus.jobs.create(a_full_job())
    stored = await bus.jobs.get(TENANT, FIRST_JOB_ID)
    assert stored is not None
    assert stored.job == a_job()


async def test_an_update_replaces_the_revision_it_read(bus: Bus) -> None:
    first = await bus.jobs.create(a_job())
    second = await bus.jobs.update(a_full_job(), first)
    assert second > first
    assert await bus.jobs.get(TENANT, FIRST_JOB_ID) == Stored(a_full_job(), second)


async def test_an_update_of_an_older_revision_is_refused(bus: Bus) -> None:
    first = await bus.jobs.create(a_job())
    second = await bus.jobs.update(replace(a_job(), attempt=1), first)
    with pytest.raises(ConflictError):
        await bus.jobs.update(a_full_job(), first)
    stored = Stored(replace(a_job(), attempt=1), second)
    assert await bus.jobs.get(TENANT, FIRST_JOB_ID) == stored


async def test_one_of_many_updates_at_once_wins(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as two:
        revision = await one.jobs.create(a_job())
        updates = [
            bus.jobs.update(replace(a_job(), attempt=attempt), revision)
            for attempt, bus in enumerate((one, two, one, two), start=1)
        ]
        results = await asyncio.gather(*updates, return_exceptions=True)
    assert [isinstance(result, ConflictError) for result in results].count(True) == 3


async def test_an_abandoned_record_is_gone_and_is_created_again_only_from_its_end(bus: Bus) -> None:
    revision = await bus.jobs.create(a_job())
    end = await bus.jobs.abandon(TENANT, FIRST_JOB_ID, revision)
    assert await bus.jobs.get(TENANT, FIRST_JOB_ID) is None
    assert await bus.jobs.latest(TENANT, FIRST_JOB_ID) == (None, end)
    for write in (
        bus.jobs.update(a_job(), revision),
        bus.jobs.create(a_job()),
        bus.jobs.create(a_job(), revision),
        bus.jobs.abandon(TENANT, FIRST_JOB_ID, revision),
    ):
        with pytest.raises(ConflictError):
            await write
    again = await bus.jobs.create(a_job(), end)
    assert await bus.jobs.latest(TENANT, FIRST_JOB_ID) == (a_job(), again)


async def test_a_record_that_was_abandoned_before_it_existed_is_not_created(bus: Bus) -> None:
    assert await bus.jobs.latest(TENANT, FIRST_JOB_ID) == (None, 0)
    end = await bus.jobs.abandon(TENANT, FIRST_JOB_ID, 0)
    with pytest.raises(ConflictError):
        await bus.jobs.create(a_job())
    await bus.jobs.create(a_job(), end)


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED])
async def test_a_record_goes_with_the_retention_however_late_it_was_written(
    state: State, open_bus: OpenBus
) -> None:
    now = time.time()
    old, young = (
        replace(a_full_job(), id=FIRST_JOB_ID + n, state=state, end_time=now - hours * 3600)
        for n, hours in enumerate((24.01, 23.9))
    )
    async with open_bus() as bus:
        await bus.jobs.create(old)  # This update simulates one of the webhook's status.
        revision = await bus.jobs.create(young)
        assert await bus.jobs.get(TENANT, old.id) is None
        assert await bus.jobs.get(TENANT, young.id) == Stored(young, revision)


async def test_a_record_of_a_job_that_has_not_ended_does_not_go_with_the_retention(
    bus: Bus,
) -> None:
    job = replace(a_job(), create_time=time.time() - 25 * 3600)
    revision = await bus.jobs.create(job)
    assert await bus.jobs.get(TENANT, job.id) == Stored(job, revision)


async def test_a_list_has_the_tenants_own_ids_newest_first(bus: Bus) -> None:
    drawn: dict[str, list[int]] = {}
    for tenant in (TENANT, "acme.labs", TENANT, "*", TENANT):
        drawn.setdefault(tenant, []).insert(0, await bus.jobs.next_id(tenant))
    for tenant, ids in drawn.items():
        assert await bus.jobs.list_ids(tenant) == ids
    assert await bus.jobs.list_ids("nobody") == []
    newest, middle, oldest = drawn[TENANT]
    assert await bus.jobs.list_ids(TENANT, most=2) == [newest, middle]
    assert await bus.jobs.list_ids(TENANT, newest, most=1) == [middle]
    assert await bus.jobs.list_ids(TENANT, middle) == [oldest]
    assert await bus.jobs.list_ids(TENANT, oldest) == []


async def test_pages_of_jobs_hold_what_a_plain_list_holds(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as two:
        drawn: list[Job] = []
        for number in range(40):
            tenant = "other" if number % 3 else TENANT
            job = a_job(await one.jobs.next_id(tenant), tenant)
            state = [State.QUEUED, State.RUNNING][number % 2]
            drawn.insert(0, replace(job, state=state, queue_sequence=number + 1))
            if number % 7:  # The other jobs are rejected after their ids are drawn.
                await one.jobs.create(drawn[0])
        for states in (None, {State.RUNNING}):
            expected = [
                job
                for job in drawn
                if job.tenant == TENANT
                and (job.id - FIRST_JOB_ID) % 7
                and (not states or job.state in states)
            ]
            found, before = [], LAST_JOB_ID + 1
            while before:
                page, before = await page_of(two.jobs, TENANT, before, 3, states)
                assert len(page) <= 3
                found += page
            assert found == expected


async def test_a_request_id_belongs_to_its_first_job(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as two:
        first = await one.jobs.claim_request(TENANT, "order 7/é", "fingerprint-a", 1)
        again = await two.jobs.claim_request(TENANT, "order 7/é", "fingerprint-b", 2)
        others = [
            await two.jobs.claim_request("other", "order 7/é", "fingerprint-b", 2),
            await two.jobs.claim_request(TENANT, "order 8", "fingerprint-b", 2),
        ]
    assert [first, again] == [("fingerprint-a", 1)] * 2
    assert others == [("fingerprint-b", 2)] * 2


async def test_a_request_id_can_be_looked_up(bus: Bus) -> None:
    assert await bus.jobs.find_request(TENANT, "r") is None
    await bus.jobs.claim_request(TENANT, "r", "fingerprint", 1)
    assert await bus.jobs.find_request(TENANT, "r") == ("fingerprint", 1)
    assert await bus.jobs.find_request("other", "r") is None


async def test_of_many_claims_at_once_all_learn_the_winner(bus: Bus) -> None:
    claims = [bus.jobs.claim_request(TENANT, "r", f"print-{n}", n) for n in range(1, 9)]
    answers = set(await asyncio.gather(*claims))
    assert len(answers) == 1


async def test_workers_are_listed_by_name_with_their_last_announcement(bus: Bus) -> None:
    for name in ("gpu-b", "gpu a/1"):
        await bus.workers.announce(a_worker(name))
    newest = replace(a_worker("gpu-b"), job_seconds=0.25)
    await bus.workers.announce(newest)
    assert await bus.workers.workers() == [a_worker("gpu a/1"), newest]


async def test_models_stay_known_when_their_workers_have_left(bus: Bus) -> None:
    await bus.workers.announce(a_worker("one", model="b.model"))
    await bus.workers.announce(a_worker("two", model="a model"))
    for name in ("one", "two", "never there"):
        await bus.workers.withdraw(name)
    known = [a_worker("", model=name).model for name in ("a model", "b.model")]
    assert await bus.workers.workers() == []
    assert await bus.workers.models() == known
    assert await bus.workers.model("b.model") == known[1]
    assert await bus.workers.model("b") is None


async def test_a_model_is_known_as_it_was_announced_last(bus: Bus) -> None:
    await bus.workers.announce(a_worker("one"))
    changed = replace(a_worker("").model, default_num_inference_steps=4)
    await bus.workers.announce(replace(a_worker("one"), model=changed))
    assert await bus.workers.models() == [changed]
