"""Which jobs a worker pulls, and when they begin."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any, cast

import pytest

from img2img_server.domain.params import JobParams, Lane
from img2img_server.engine.base import Engine, JobPlan
from img2img_server.interfaces.queue import SIZES, QueueSource, UsageReport, size_of, slot_of
from img2img_server.worker.dispatch import MAX_WAIT_SECONDS, Dispatcher, HeldJob, Phase
from img2img_server.worker.usage import FleetUsage

_ids = itertools.count(1)


class OneJobEngine:
    """An engine that runs one job at a time, unless `runs` names the jobs of its next step."""

    def __init__(self) -> None:
        self.runs: set[int] | None = None
        self.busy = False

    def next_jobs(self, plans: Sequence[JobPlan]) -> Collection[int]:
        if self.runs is not None:
            return self.runs
        return set() if self.busy else {plan.job_id for plan in plans[:1]}


class Case:
    """A dispatcher with its engine, its device times and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = OneJobEngine()
        self.usage = FleetUsage("w1", "fake")
        self.dispatcher = Dispatcher(cast(Engine, self.engine), self.usage, clock=lambda: self.now)

    def hold(
        self, tenant: str = "a", lane: Lane = Lane.REALTIME, size: int = 1, attempts: int = 0
    ) -> HeldJob:
        params = JobParams(prompt="p", model="fake", lane=lane)
        plan = JobPlan(job_id=next(_ids), tenant=tenant, params=params)
        held = self.dispatcher.add(plan, size, attempts)
        if held.phase is Phase.HAS_BEGUN:
            self.engine.busy = True
        return held

    def end(self, held: HeldJob) -> None:
        self.engine.busy = False
        self.dispatcher.remove(held)

    def order(self, *sources: QueueSource) -> list[str]:
        """Returns the tenants of the sources from which may be pulled."""
        return [tenant for source in self.dispatcher.order(sources) for tenant in source.jobs]


def source(tenant: str, lane: Lane = Lane.REALTIME, size: int = 1, number: int = 3) -> QueueSource:
    return QueueSource(lane=lane, size=size, slot=slot_of(tenant), jobs={tenant: number})


@pytest.fixture
def case() -> Case:
    return Case()


def test_a_job_begins_at_once_on_an_idle_engine_and_the_next_one_waits(case: Case) -> None:
    first, second = case.hold(), case.hold()
    assert (first.phase, second.phase) == (Phase.HAS_BEGUN, Phase.WAITS)
    case.end(first)
    assert second.may_begin.is_set()


def test_one_job_is_pulled_ahead_and_no_further_one_of_that_kind(case: Case) -> None:
    assert case.order(source("a")) == ["a"]
    case.hold()
    assert case.order(source("a")) == ["a"]
    case.hold()
    assert case.order(source("a")) == []


def test_jobs_that_join_the_next_step_do_not_count_as_waiting(case: Case) -> None:
    last = next(_ids)
    case.engine.runs = {last + 1, last + 2, last + 3}
    assert [case.hold().phase for _ in range(3)] == [Phase.HAS_BEGUN] * 3
    assert case.order(source("a")) == ["a"]


def test_a_job_that_finishes_leaves_the_device_to_the_next_one(case: Case) -> None:
    first, second = case.hold(), case.hold()
    case.engine.busy = False
    case.dispatcher.finish(first)
    assert second.phase is Phase.HAS_BEGUN
    assert case.dispatcher.begun == 1


@pytest.mark.parametrize(
    ("waiting", "is_pulled"),
    [
        (source("a"), False),
        (source("a", size=0), True),
        (source("a", size=2), False),
        (source("b", size=3), True),
        (source("a", Lane.BATCH), False),
        (source("b", Lane.BATCH), False),
    ],
    ids=["equal", "shorter", "longer", "of another tenant", "batch", "batch of another tenant"],
)
def test_a_place_is_kept_for_jobs_that_go_before_those_held(
    case: Case, waiting: QueueSource, is_pulled: bool
) -> None:
    case.hold("a", size=1)
    case.hold("a", size=1)
    assert bool(case.order(waiting)) is is_pulled


def test_a_place_is_kept_for_realtime_while_batch_jobs_are_held(case: Case) -> None:
    case.hold("a", Lane.BATCH)
    case.hold("a", Lane.BATCH)
    assert case.order(source("a", Lane.BATCH), source("a", size=3)) == ["a"]
    case.hold("a")
    assert case.order(source("a")) == []  # The place is taken.


def test_few_jobs_are_paused_for_others(case: Case) -> None:
    case.engine.runs = set()
    for tenant in "abc":
        held = case.hold(tenant)
        held.phase = Phase.HAS_BEGUN
    case.hold("a")
    assert case.order(source("d")) == []


def test_the_tenant_with_the_least_device_time_goes_first(case: Case) -> None:
    case.dispatcher.order([source("a"), source("b"), source("c")])
    case.usage.receive(UsageReport(worker="w2", model="fake", seconds={"a": 3.0, "b": 1.0}))
    case.usage.receive(UsageReport(worker="w2", model="other", seconds={"c": 9.0}))
    case.usage.receive(UsageReport(worker="w1", model="fake", seconds={"c": 9.0}))  # its own
    assert case.order(source("a"), source("b"), source("c")) == ["c", "b", "a"]


def test_idle_time_earns_no_credit(case: Case) -> None:
    case.dispatcher.order([source("a")])
    case.usage.receive(UsageReport(worker="w2", model="fake", seconds={"a": 100.0}))
    case.dispatcher.order([source("a"), source("b")])
    case.usage.receive(UsageReport(worker="w2", model="fake", seconds={"b": 1.0}))
    assert case.order(source("a"), source("b")) == ["a", "b"]


def test_own_steps_are_reported_once(case: Case) -> None:
    params = JobParams(prompt="p", model="fake", width=512, height=512)
    case.usage.add_step("a", params, 1e-6)
    report = case.usage.take_report()
    assert report is not None
    assert report.seconds == {"a": pytest.approx(0.262144)}
    assert case.usage.take_report() is None


def test_shorter_jobs_and_realtime_go_first_until_the_others_waited_too_long(case: Case) -> None:
    sources = [source("a", Lane.BATCH), source("b", size=2), source("b", size=0, number=1)]
    kinds = [(each.lane, each.size) for each in case.dispatcher.order(sources)]
    assert kinds == [(Lane.REALTIME, 0), (Lane.REALTIME, 2), (Lane.BATCH, 1)]
    case.dispatcher.note([], sources[2])
    case.now = MAX_WAIT_SECONDS + 1
    kinds = [(each.lane, each.size) for each in case.dispatcher.order(sources)]
    assert kinds[-1] == (Lane.REALTIME, 0)
    case.dispatcher.note([sources[0]], sources[1])
    kinds = [(each.lane, each.size) for each in case.dispatcher.order(sources)]
    assert kinds == [(Lane.REALTIME, 0), (Lane.REALTIME, 2), (Lane.BATCH, 1)]


def test_from_the_third_attempt_on_a_job_runs_alone(case: Case) -> None:
    first = case.hold()
    case.engine.busy = False
    alone = case.hold(attempts=2)
    assert alone.phase is Phase.WAITS
    assert case.order(source("a"), source("b", size=0)) == []
    case.dispatcher.finish(first)
    assert alone.phase is Phase.WAITS  # The upload would be lost with the worker, too.
    case.end(first)
    assert alone.phase is Phase.HAS_BEGUN
    assert not case.dispatcher.may_pull
    later = case.hold()
    assert later.phase is Phase.WAITS
    case.end(alone)
    assert later.phase is Phase.HAS_BEGUN


def test_a_worker_that_handed_a_job_back_leaves_it_to_the_idle_one(case: Case) -> None:
    case.hold()
    waiting = case.hold()
    case.dispatcher.remove(waiting, requeued=True)
    assert case.order(source("a")) == []
    case.now += 1.5
    assert case.order(source("a")) == ["a"]


def test_a_worker_without_jobs_pulls_at_once_also_after_a_hand_back(case: Case) -> None:
    first = case.hold()
    case.dispatcher.remove(case.hold(), requeued=True)
    case.end(first)
    assert case.dispatcher.is_idle
    assert case.order(source("a")) == ["a"]


def test_sizes_grow_by_factors_of_four() -> None:
    sizes = [size_of(work) for work in (0.0, 3.9, 4.0, 15.9, 16.0, 63.9, 64.0, 1e6)]
    assert sizes == [0, 0, 1, 1, 2, 2, 3, SIZES - 1]


def test_slots_are_the_same_in_every_process() -> None:
    found: dict[str, Any] = {tenant: slot_of(tenant) for tenant in ("acme", "other", "")}
    assert found == {"acme": 62, "other": 32, "": 0}


def test_as_many_jobs_are_pulled_at_once_as_would_join_the_next_step(case: Case) -> None:
    assert case.dispatcher.most == 1, "nothing is known about the first job"
    case.engine.runs = {1_000_000, *range(-3, 0)}
    held = case.hold()
    assert case.dispatcher.most == 1, "the job has not begun"
    case.engine.runs.add(held.plan.job_id)
    case.dispatcher.check()
    assert case.dispatcher.most == 3
    case.engine.runs -= {-1, -2, -3}
    assert case.dispatcher.most == 1, "no other job would join"
