"""The order in which the batching scheduler serves rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from img2img_server.domain.params import Lane
from img2img_server.engine.scheduler import Row, Scheduler

ROW = Row(
    job_id=1,
    sample=0,
    tenant="a",
    lane=Lane.REALTIME,
    height=512,
    width=512,
    forwards=1,
    steps=3,
    enqueue_time=0.0,
)


def row(job_id: int, **changes: Any) -> Row:
    found = replace(ROW, job_id=job_id, **changes)
    return (
        found if "batch_key" in changes else replace(found, batch_key=(found.height, found.width))
    )


def step(scheduler: Scheduler, now: float = 0.0) -> list[int]:
    """Runs one batch and returns the job ids of its rows."""
    batch = scheduler.next_batch(now)
    assert batch is not None
    scheduler.complete([member.key for member in batch.rows], now)
    return sorted(member.job_id for member in batch.rows)


def test_rows_of_different_step_counts_share_a_batch_and_leave_one_by_one() -> None:
    scheduler = Scheduler(max_batch_size=8)
    for job_id, steps in ((1, 1), (2, 3), (3, 2)):
        scheduler.add(row(job_id, steps=steps), now=0.0)

    assert [step(scheduler) for _ in range(3)] == [[1, 2, 3], [2, 3], [2]]
    assert scheduler.next_batch(0.0) is None


def test_a_row_joins_at_the_next_step() -> None:
    scheduler = Scheduler(max_batch_size=8)
    scheduler.add(row(1), now=0.0)
    first = step(scheduler)
    scheduler.add(row(2), now=1.0)

    assert (first, step(scheduler)) == ([1], [1, 2])


def test_guided_rows_cost_two_forwards() -> None:
    scheduler = Scheduler(max_batch_size=4)
    for job_id in (1, 2, 3):
        scheduler.add(row(job_id, forwards=2), now=0.0)

    assert step(scheduler) == [1, 2]


def test_a_small_younger_row_fills_what_a_larger_one_leaves() -> None:
    scheduler = Scheduler(max_batch_size=3)
    scheduler.add(row(1, forwards=2), now=0.0)
    scheduler.add(row(2, forwards=2, enqueue_time=1.0), now=0.0)
    scheduler.add(row(3, forwards=1, steps=9, enqueue_time=2.0), now=0.0)

    assert step(scheduler) == [1, 3]


def test_a_row_larger_than_the_capacity_runs_alone() -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.add(row(1, forwards=2), now=0.0)
    scheduler.add(row(2, steps=9), now=0.0)

    assert step(scheduler) == [1]


def test_sizes_do_not_mix_and_the_older_one_goes_first() -> None:
    scheduler = Scheduler(max_batch_size=8)
    scheduler.add(row(1, height=256, enqueue_time=1.0), now=0.0)
    scheduler.add(row(2, enqueue_time=0.0, steps=1), now=0.0)
    scheduler.add(row(3, enqueue_time=2.0, steps=1), now=0.0)

    assert [step(scheduler), step(scheduler)] == [[2, 3], [1]]


def test_realtime_goes_before_batch_until_batch_has_waited_too_long() -> None:
    scheduler = Scheduler(max_batch_size=1, max_wait_seconds=5.0)
    scheduler.add(row(1, lane=Lane.BATCH, steps=9), now=0.0)
    scheduler.add(row(2, enqueue_time=1.0, steps=9), now=0.0)

    assert [step(scheduler, now) for now in (1.0, 5.0, 5.1, 6.0)] == [[2], [2], [1], [2]]


def test_tenants_share_by_work_and_not_by_rows() -> None:
    scheduler = Scheduler(max_batch_size=1)
    for job_id in (1, 2, 3, 4):
        scheduler.add(row(job_id, tenant="many", steps=50), now=0.0)
    scheduler.add(row(9, tenant="one", steps=50, forwards=2), now=0.0)

    served = [step(scheduler)[0] for _ in range(30)]
    assert served.count(9) == 10, "its steps cost twice as much"


def test_a_tenant_that_was_away_gets_no_credit_for_it() -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.add(row(1, tenant="a", steps=100), now=0.0)
    for _ in range(50):
        step(scheduler)
    scheduler.add(row(2, tenant="b", steps=100), now=0.0)

    served = [step(scheduler)[0] for _ in range(20)]
    assert served.count(2) == 10


def test_a_tenant_cannot_shed_its_debt_by_leaving() -> None:
    scheduler = Scheduler(max_batch_size=2)
    scheduler.add(row(1, tenant="a", height=2048), now=0.0)
    scheduler.add(row(2, tenant="b", steps=20), now=0.0)
    first = step(scheduler)
    scheduler.cancel(1)
    scheduler.add(row(3, tenant="a", height=2048), now=0.0)

    assert (first, [step(scheduler)[0] for _ in range(5)]) == ([1], [2, 2, 2, 2, 3])


def test_cancelling_a_job_in_flight_removes_its_rows() -> None:
    scheduler = Scheduler(max_batch_size=8)
    scheduler.add(row(1), now=0.0)
    scheduler.add(row(1, sample=1), now=0.0)
    batch = scheduler.next_batch(0.0)

    assert batch is not None
    assert scheduler.cancel(1) == ((1, 0), (1, 1))
    assert scheduler.complete([member.key for member in batch.rows], 0.0) == ()
    assert len(scheduler) == 0


def test_among_equals_the_older_one_runs_to_its_end_first() -> None:
    scheduler = Scheduler(max_batch_size=1)
    for job_id in (1, 2):
        scheduler.add(row(job_id, enqueue_time=float(job_id)), now=2.0)

    assert [step(scheduler, 3.0 + i)[0] for i in range(6)] == [1, 1, 1, 2, 2, 2]


def test_a_short_row_that_just_came_goes_before_a_long_one_that_has_waited() -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.add(row(1, steps=30, enqueue_time=0.0), now=0.0)
    scheduler.add(row(2, steps=2, enqueue_time=10.0), now=10.0)

    assert [step(scheduler, 10.0) for _ in range(3)] == [[2], [2], [1]]


def test_a_long_row_that_has_waited_long_enough_goes_before_a_short_one() -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.add(row(1, steps=10, enqueue_time=0.0), now=0.0)
    scheduler.add(row(2, steps=2, enqueue_time=10.0), now=10.0)

    assert step(scheduler, 10.0) == [1]


def test_rows_join_while_those_that_wait_gain_more_than_the_chosen_lose() -> None:
    """Four rows of one forward wait. The fixed cost of a step is half the cost of a row."""
    scheduler = Scheduler(max_batch_size=8, fixed_step_cost=512 * 512 // 2)
    for job_id in (1, 2, 3, 4):
        scheduler.add(row(job_id, steps=1), now=0.0)

    assert [step(scheduler) for _ in range(3)] == [[1, 2], [3], [4]]


@pytest.mark.parametrize(("overhead", "batches"), [(0.9, [[1], [2]]), (1.1, [[1, 2]])])
def test_two_share_a_step_when_it_costs_more_than_a_row_beyond_them(
    overhead: float, batches: list[list[int]]
) -> None:
    """Otherwise the first row would lose more time than the second one saves."""
    scheduler = Scheduler(max_batch_size=8, fixed_step_cost=int(overhead * 512 * 512))
    for job_id in (1, 2):
        scheduler.add(row(job_id, steps=1), now=0.0)

    assert [step(scheduler) for _ in batches] == batches


def test_a_step_that_costs_nothing_beyond_its_rows_is_not_shared() -> None:
    scheduler = Scheduler(max_batch_size=8, fixed_step_cost=0)
    for job_id in (1, 2):
        scheduler.add(row(job_id, steps=1), now=0.0)

    assert [step(scheduler) for _ in range(2)] == [[1], [2]]


def test_rows_with_different_batch_keys_share_no_batch() -> None:
    scheduler = Scheduler(max_batch_size=8)
    for job_id, batch_key in ((1, "ink"), (2, ""), (3, "ink"), (4, "oil")):
        scheduler.add(row(job_id, batch_key=batch_key, steps=1), now=0.0)

    assert [step(scheduler) for _ in range(3)] == [[1, 3], [2], [4]]


def timed_step(scheduler: Scheduler, now: float) -> list[int]:
    """Runs one batch that takes a second from `now` on."""
    batch = scheduler.next_batch(now)
    assert batch is not None
    scheduler.complete([member.key for member in batch.rows], now + 1)
    return [member.job_id for member in batch.rows]


def test_a_row_goes_first_when_it_would_miss_its_deadline_otherwise() -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.add(row(1, steps=4, deadline=12.0), now=0.0)
    scheduler.add(row(2, steps=3), now=0.0)

    # Each step takes a second: from 5 s on, the remaining time is less than twice the 4 s that the
    # row needs.
    assert [timed_step(scheduler, float(now)) for now in range(7)] == [
        [2],
        [2],
        [2],
        [1],
        [1],
        [1],
        [1],
    ]
    scheduler.add(row(1, steps=4, enqueue_time=7.0, deadline=14.0), now=7.0)
    scheduler.add(row(2, steps=3, enqueue_time=7.0), now=7.0)
    assert timed_step(scheduler, 7.0) == [1]


def test_a_deadline_that_has_passed_hurries_no_row() -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.add(row(1, steps=40, deadline=3.0), now=0.0)
    timed_step(scheduler, 0.0)
    scheduler.add(row(2, steps=2, enqueue_time=4.0), now=4.0)

    assert timed_step(scheduler, 4.0) == [2]


def test_a_deadline_does_not_buy_the_turn_of_another_tenant() -> None:
    scheduler = Scheduler(max_batch_size=1)
    scheduler.add(row(1, steps=9, tenant="hasty", deadline=5.0), now=0.0)
    scheduler.add(row(2, steps=9, tenant="calm"), now=0.0)

    served = [timed_step(scheduler, float(now))[0] for now in range(4)]
    assert sorted(served) == [1, 1, 2, 2]


def test_a_learned_limit_holds_for_its_size_and_lets_a_single_row_run() -> None:
    scheduler = Scheduler(max_batch_size=8)
    scheduler.limit(512, 512, 2, now=0.0)
    scheduler.limit(512, 512, 3, now=0.0)
    scheduler.limit(256, 256, 0, now=0.0)
    for job_id in (1, 2, 3):
        scheduler.add(row(job_id, steps=1), now=0.0)
    scheduler.add(row(4, steps=9, height=256, width=256, enqueue_time=1.0), now=1.0)

    assert [step(scheduler, 1.0) for _ in range(3)] == [[1, 2], [3], [4]]


def test_a_learned_limit_is_tried_again_after_ten_minutes() -> None:
    scheduler = Scheduler(max_batch_size=8)
    scheduler.limit(512, 512, 1, now=0.0)
    for job_id in (1, 2):
        scheduler.add(row(job_id, steps=9), now=0.0)

    assert step(scheduler, 599.0) == [1]
    assert step(scheduler, 601.0) == [1, 2]
