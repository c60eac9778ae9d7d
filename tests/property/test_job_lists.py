"""Pages of jobs, compared with a plain list, and the number of records that they read."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from img2img_server.api.records import PAGE_READS, page_of
from img2img_server.domain.job import LAST_JOB_ID, Job, State
from img2img_server.domain.params import JobParams
from img2img_server.interfaces.records import Stored
from img2img_server.nats.records import newest
from img2img_server.testing.memory_records import MemoryJobStore

TENANT = "acme"
RECORD = Job(
    id=0,
    tenant=TENANT,
    params=JobParams(prompt="a lighthouse"),
    file_prefix="5e0c",
    future_urls=(),
    create_time=1.0,
)
STATES = st.sampled_from([State.QUEUED, State.RUNNING, State.CANCELLED])


class CountingStore(MemoryJobStore):
    """A store that counts the records and the ids that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.records = self.ids = 0

    async def get(self, tenant: str, job_id: int) -> Stored | None:
        self.records += 1
        return await super().get(tenant, job_id)

    async def list_ids(
        self, tenant: str, before: int = LAST_JOB_ID + 1, most: int = 100
    ) -> list[int]:
        found = await super().list_ids(tenant, before, most)
        self.ids += len(found)
        return found

    async def draw(self, tenant: str, state: State | None) -> Job:
        """Draws an id; creates its record unless `state` is None."""
        job = replace(RECORD, id=await self.next_id(tenant), tenant=tenant, queue_sequence=1)
        if state is not None:
            job = replace(job, state=state)
            await self.create(job)
        return job


@given(
    drawn=st.lists(st.tuples(st.sampled_from([TENANT, "other"]), st.none() | STATES), max_size=60),
    sizes=st.lists(st.integers(1, 100), min_size=1),
    states=st.none() | st.sets(STATES, min_size=1),
    came_later=st.integers(0, 3),
)
def test_pages_hold_the_jobs_of_a_plain_list(
    drawn: list[tuple[str, State | None]],
    sizes: list[int],
    states: set[State] | None,
    came_later: int,
) -> None:
    async def play() -> None:
        store = CountingStore()
        jobs = [(await store.draw(tenant, state), state) for tenant, state in drawn]
        expected = [
            job
            for job, state in reversed(jobs)
            if job.tenant == TENANT and state is not None and (states is None or state in states)
        ]
        found: list[Job] = []
        before, pages = LAST_JOB_ID + 1, 0
        while before:
            size = sizes[pages % len(sizes)]
            page, before = await page_of(store, TENANT, before, size, states)
            assert len(page) <= size
            found += page
            pages += 1
            for _ in range(came_later):  # A newer job does not move older ones to another page.
                await store.draw(TENANT, State.QUEUED)
        assert found == expected

    asyncio.run(play())


async def test_the_cost_of_a_page_does_not_grow_with_the_tenants_history() -> None:
    costs = []
    for history in (200, 5_000):
        store = CountingStore()
        for _ in range(history):
            await store.draw(TENANT, State.CANCELLED)
        page, _ = await page_of(store, TENANT, LAST_JOB_ID + 1, 20)
        costs.append((len(page), store.records, store.ids))
    assert costs == [(20, 20, 21)] * 2


async def test_a_page_reads_a_bounded_number_of_records_for_a_rare_state() -> None:
    store = CountingStore()
    wanted = await store.draw(TENANT, State.RUNNING)
    for _ in range(3 * PAGE_READS):
        await store.draw(TENANT, State.CANCELLED)
    before, found, reads = LAST_JOB_ID + 1, [], []
    while before:
        store.records = 0
        page, before = await page_of(store, TENANT, before, 20, {State.RUNNING})
        found += page
        reads.append(store.records)
    assert found == [wanted]
    assert max(reads) == PAGE_READS


@given(
    numbers=st.sets(st.integers(1, 100_000), max_size=300)
    | st.tuples(st.integers(1, 90_000), st.integers(0, 2_000)).map(
        lambda burst: set(range(burst[0], sum(burst)))
    ),
    before=st.integers(1, 100_001),
    most=st.integers(1, 100),
)
def test_the_newest_numbers_are_found_in_few_reads(
    numbers: set[int], before: int, most: int
) -> None:
    ascending, reads = sorted(numbers), 0

    async def read(start: int, most: int) -> list[int]:
        nonlocal reads
        reads += 1
        first = bisect_left(ascending, start)
        return ascending[first : first + most]

    found = asyncio.run(newest(read, before, most))
    assert found == [number for number in reversed(ascending) if number < before][:most]
    assert reads <= 10 + 6 * math.log(100_000, 4)
