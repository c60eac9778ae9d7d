"""The batching scheduler, compared with a simple model of its rules."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from img2img_server.domain.params import Lane
from img2img_server.engine.scheduler import Batch, Key, Row, Scheduler

MAX_WAIT_SECONDS = 5.0


@dataclass
class Expected:
    """The test's record of a row. `ahead`: number of overdue rows before it."""

    row: Row
    steps_left: int
    waiting_since: float
    ahead: int | None = None


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, cancels, runs and completes rows at random. No row is lost, repeated or starved."""

    batches: Bundle[Batch] = Bundle("batches")

    @initialize(capacity=st.integers(1, 9), overhead=st.sampled_from([None, 0, 256**2, 3 * 512**2]))
    def start(self, capacity: int, overhead: int | None) -> None:
        self.capacity, self.overhead = capacity, overhead
        self.scheduler = Scheduler(capacity, overhead, MAX_WAIT_SECONDS)
        self.expected: dict[Key, Expected] = {}
        self.in_flight: set[Key] = set()
        self.now = 0.0
        self.next_job = 1

    @rule(
        samples=st.integers(1, 4),
        tenant=st.sampled_from("abc"),
        lane=st.sampled_from(Lane),
        side=st.sampled_from([256, 512]),
        forwards=st.integers(1, 2),
        steps=st.integers(1, 5),
        adapter=st.sampled_from(["", "ink"]),
        seconds_left=st.sampled_from([None, 0.5, 20.0]),
    )
    def add(
        self,
        samples: int,
        tenant: str,
        lane: Lane,
        side: int,
        forwards: int,
        steps: int,
        adapter: str,
        seconds_left: float | None,
    ) -> None:
        for sample in range(samples):
            row = Row(
                job_id=self.next_job,
                sample=sample,
                tenant=tenant,
                lane=lane,
                height=side,
                width=side,
                forwards=forwards,
                steps=steps,
                enqueue_time=self.now,
                batch_key=(side, adapter),
                deadline=None if seconds_left is None else self.now + seconds_left,
            )
            self.scheduler.add(row, self.now)
            self.expected[row.key] = Expected(row, steps, self.now)
        self.next_job += 1

    @rule(seconds=st.floats(0.1, 4.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted({key[0] for key in self.expected})))
        theirs = {key for key in self.expected if key[0] == job_id}
        assert set(self.scheduler.cancel(job_id)) == theirs
        for key in theirs:
            del self.expected[key]
            self.in_flight.discard(key)

    @rule(target=batches)
    def run(self) -> object:
        free = self.expected.keys() - self.in_flight
        self._note_overdue(free)
        batch = self.scheduler.next_batch(self.now)
        assert (batch is None) == (not free)
        if batch is None:
            return multiple()
        keys = [row.key for row in batch.rows]
        assert len(set(keys)) == len(keys), "no row twice in a batch"
        assert set(keys) <= free, "no row runs twice at once, and none that was cancelled"
        assert batch.forwards <= self.capacity or len(keys) == 1
        if self.overhead is not None:
            costs = (place * row.work for place, row in enumerate(batch.rows))
            assert all(cost < len(free) * self.overhead for cost in [*costs][1:])
        assert len({row.batch_key for row in batch.rows}) == 1
        self._check_overdue(free - set(keys))
        self.in_flight |= set(keys)
        return batch

    @rule(batch=consumes(batches))
    def complete(self, batch: Batch) -> None:
        finished = set()
        for row in batch.rows:
            if row.key in self.in_flight:
                expected = self.expected[row.key]
                expected.steps_left -= 1
                expected.waiting_since, expected.ahead = self.now, None
                if not expected.steps_left:
                    finished.add(row.key)
        self.in_flight -= {row.key for row in batch.rows}
        reported = self.scheduler.complete([row.key for row in batch.rows], self.now)
        assert set(reported) == finished
        for key in finished:
            del self.expected[key]

    @rule(batch=consumes(batches))
    def put_back(self, batch: Batch) -> None:
        keys = [row.key for row in batch.rows]
        self.scheduler.put_back(key for key in keys if key in self.in_flight)
        self.in_flight -= set(keys)
        for expected in self.expected.values():
            # The order is computed again: rows that were put back keep their positions.
            expected.ahead = None

    @invariant()
    def holds_every_row(self) -> None:
        assert len(self.scheduler) == len(self.expected)

    def _note_overdue(self, free: set[Key]) -> None:
        line = sorted(
            (key for key in free if self._is_overdue(key)),
            key=lambda key: (self.expected[key].waiting_since, key),
        )
        for place, key in enumerate(line):
            expected = self.expected[key]
            if expected.ahead is None:
                expected.ahead = place

    def _check_overdue(self, left: set[Key]) -> None:
        """Asserts that every batch serves at least the first overdue row, so that positions only
        decrease.
        """
        for key in left:
            expected = self.expected[key]
            if expected.ahead is not None:
                expected.ahead -= 1
                assert expected.ahead >= 0, "starved beyond the bound"

    def _is_overdue(self, key: Key) -> bool:
        return self.now - self.expected[key].waiting_since > MAX_WAIT_SECONDS


SchedulerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase
