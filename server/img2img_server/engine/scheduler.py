"""Decides which samples take the next denoising step together. It uses no torch, clock or threads.

A sample is a row. Rows join and leave at every step. A batch holds rows of one batch key only (one
size in most families, the same LoRAs in the weights). Each step takes the rows in the order of
`Priority`.

The first row fixes the batch key. Other rows with this key join as long as that is worthwhile:
every row of a batch waits for all of its rows, but the fixed cost of a step is paid once, which
saves time for the rows that join and for the rows that still wait.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from img2img_server.domain.params import Lane
from img2img_server.engine.fair_share import FairShare

Key = tuple[int, int]  # job id and sample index

_LANE_ORDER = {Lane.REALTIME: 0, Lane.BATCH: 1}
# seconds; added to every age, so that a new short row goes before a long one at once
_HEAD_START_SECONDS = 0.1
# A row is urgent when the time left is less than this many times the time that it needs.
_URGENT_RATIO = 2.0
_SPEED_WEIGHT = 0.2
_LIMIT_SECONDS = 600.0
# A job is taken this long before its first step, so that the device does not wait for its record.
LEAD_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample to denoise.

    Attributes:
        forwards: The cost of a step; 2 with guidance, whose unguided prediction is a forward too.
        steps: The number of steps that the row still needs, at least 1.
        batch_key: Rows with different keys share no batch.
        deadline: The time at which the image becomes useless, on the clock of `enqueue_time`; None:
            never.
    """

    job_id: int
    sample: int
    tenant: str
    lane: Lane
    height: int
    width: int
    forwards: int
    steps: int
    enqueue_time: float
    batch_key: Hashable = ()
    deadline: float | None = None

    @property
    def key(self) -> Key:
        return self.job_id, self.sample

    @property
    def work(self) -> int:
        """Returns pixels x forwards of one step."""
        return self.height * self.width * self.forwards


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows with one batch key that take their next step together."""

    rows: tuple[Row, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Returns height and width of the largest row, to which smaller ones are padded."""
        row = max(self.rows, key=lambda row: row.height * row.width)
        return row.height, row.width

    @property
    def forwards(self) -> int:
        return sum(row.forwards for row in self.rows)


@dataclass(slots=True)
class _Entry:
    row: Row
    steps_left: int
    waiting_since: float
    in_flight: bool = False
    step_began: float = 0.0

    @property
    def work_left(self) -> int:
        return self.steps_left * self.row.work


class Priority(NamedTuple):
    """The order of rows: the smallest goes first.

    Attributes:
        has_waited_too_long: 0 for rows that waited longer than `max_wait_seconds`, else 1.
        waiting_since: Orders the rows that waited too long; 0.0 for the others.
        lane: The realtime lane goes before the batch lane.
        tenant_work: The tenant that has had the least work (pixels x forwards) goes first.
        is_urgent: 0 for rows that will soon miss their deadline, else 1.
        score: -age / (remaining work)^2, so that a short job does not wait for a long one. With the
            plain ratio, all jobs would be slowed by the same factor, and a short job would wait for
            the length of a long one.
        enqueue_time: Among equals, the older row goes first. The remaining fields make the order
            total.
    """

    has_waited_too_long: int
    waiting_since: float
    lane: int
    tenant_work: float
    is_urgent: int
    score: float
    enqueue_time: float
    job_id: int
    sample: int


class Scheduler:
    """Picks the rows of every step.

    Args:
        max_batch_size: the largest batch, in forwards. A row that costs more than that runs alone.
        fixed_step_cost: what a step costs beyond its rows, in pixels x forwards; None: a larger
            batch is always worthwhile, as on a GPU.
        max_wait_seconds: a row that has waited longer since its last step goes before every row
            that has not.
    """

    def __init__(
        self,
        max_batch_size: int,
        fixed_step_cost: int | None = None,
        max_wait_seconds: float = 30.0,
    ) -> None:
        assert max_batch_size >= 1
        self._max_batch_size = max_batch_size
        self._fixed_step_cost = fixed_step_cost
        self._max_wait_seconds = max_wait_seconds
        # the limit of forwards by size, and the time at which it expires
        self._limits: dict[tuple[int, int], tuple[int, float]] = {}
        self._entries: dict[Key, _Entry] = {}
        self._work_of_tenant = FairShare()
        self._seconds_per_work = 0.0  # 0.0: not measured yet

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, row: Row, now: float) -> None:
        """Adds a row. Its key must be new."""
        assert row.key not in self._entries
        assert row.steps >= 1
        self._work_of_tenant.activate(row.tenant, self._present())
        self._entries[row.key] = _Entry(row, row.steps, now)

    def cancel(self, job_id: int) -> tuple[Key, ...]:
        """Removes all rows of a job, also those in flight; returns their keys."""
        gone = tuple(key for key in self._entries if key[0] == job_id)
        for key in gone:
            self._remove(key)
        return gone

    def limit(self, height: int, width: int, forwards: int, now: float) -> None:
        """Limits the forwards of batches of this size for a while. A single row always runs."""
        most = min(forwards, self._limit(height, width, now))
        self._limits[height, width] = most, now + _LIMIT_SECONDS

    def copy(self) -> Scheduler:
        """Returns an independent copy, which another thread may ask for `next_jobs`."""
        other = Scheduler(self._max_batch_size, self._fixed_step_cost, self._max_wait_seconds)
        other._limits = dict(self._limits)
        other._entries = {key: replace(entry) for key, entry in self._entries.items()}
        other._work_of_tenant = self._work_of_tenant.copy()
        other._seconds_per_work = self._seconds_per_work
        return other

    def next_jobs(self, rows: Iterable[Row], now: float) -> frozenset[int]:
        """Returns the jobs that would take part in the next step if these rows were added now.

        Rows in flight that will end within LEAD_SECONDS count no more. The scheduler does not
        change.
        """
        later = self.copy()
        for key, entry in list(later._entries.items()):
            if entry.in_flight and self._ends_soon(entry):
                later._remove(key)
            entry.in_flight = False
        for row in rows:
            if row.key not in later._entries:
                later.add(row, now)
        batch = later.next_batch(now)
        return frozenset(row.job_id for row in batch.rows) if batch else frozenset()

    def _ends_soon(self, entry: _Entry) -> bool:
        seconds = entry.work_left * self._seconds_per_work
        return entry.steps_left == 1 or 0.0 < seconds <= LEAD_SECONDS

    def next_batch(self, now: float) -> Batch | None:
        """Returns the rows that step next, or None. Each stays in flight until `complete`."""
        line = sorted(
            (entry for entry in self._entries.values() if not entry.in_flight),
            key=lambda entry: self._priority(entry, now),
        )
        if not line:
            return None
        chosen = self._choose(line, now)
        for entry in chosen:
            entry.in_flight, entry.step_began = True, now
        return Batch(tuple(entry.row for entry in chosen))

    def put_back(self, keys: Iterable[Key]) -> None:
        """Requeues rows of a batch that did not run."""
        for key in keys:
            if entry := self._entries.get(key):
                assert entry.in_flight
                entry.in_flight = False

    def complete(self, keys: Iterable[Key], now: float) -> tuple[Key, ...]:
        """Counts a step of each row. Removes and returns the finished rows.

        Keys of rows that were cancelled in the meantime are ignored.
        """
        finished = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                continue
            assert entry.in_flight
            entry.in_flight = False
            entry.steps_left -= 1
            self._measure_speed(entry, now)
            entry.waiting_since = now
            self._work_of_tenant.add(entry.row.tenant, entry.row.work)
            if not entry.steps_left:
                finished.append(key)
                self._remove(key)
        return tuple(finished)

    def _limit(self, height: int, width: int, now: float) -> int:
        forwards, until = self._limits.get((height, width), (self._max_batch_size, now))
        return forwards if now < until else self._max_batch_size

    def _choose(self, line: Sequence[_Entry], now: float) -> list[_Entry]:
        """Returns the first row in the order of `Priority` and the rows that join it."""
        first = line[0].row
        chosen, forwards = [line[0]], first.forwards
        most = self._limit(first.height, first.width, now)
        for entry in line[1:]:
            row = entry.row
            if (
                row.batch_key == first.batch_key
                and forwards + row.forwards <= most
                and self._is_worth_joining(row, len(chosen), len(line))
            ):
                chosen.append(entry)
                forwards += row.forwards
        return chosen

    def _is_worth_joining(self, row: Row, chosen: int, waiting: int) -> bool:
        """Compares the time that joining saves this row and the waiting ones with the time that it
        costs the chosen ones."""
        if self._fixed_step_cost is None:
            return True
        return (waiting - chosen) * self._fixed_step_cost > chosen * row.work

    def _priority(self, entry: _Entry, now: float) -> Priority:
        row = entry.row
        if now - entry.waiting_since > self._max_wait_seconds:
            return Priority(0, entry.waiting_since, 0, 0.0, 0, 0.0, 0.0, row.job_id, row.sample)
        age = max(0.0, now - row.enqueue_time) + _HEAD_START_SECONDS
        return Priority(
            has_waited_too_long=1,
            waiting_since=0.0,
            lane=_LANE_ORDER[row.lane],
            tenant_work=self._work_of_tenant[row.tenant],
            is_urgent=0 if self._is_urgent(entry, now) else 1,
            score=-age / entry.work_left**2,
            enqueue_time=row.enqueue_time,
            job_id=row.job_id,
            sample=row.sample,
        )

    def _is_urgent(self, entry: _Entry, now: float) -> bool:
        """Returns whether the row must run now to meet its deadline. A passed deadline does not
        count.
        """
        if entry.row.deadline is None:
            return False
        left = entry.row.deadline - now
        return 0 < left < _URGENT_RATIO * entry.work_left * self._seconds_per_work

    def _measure_speed(self, entry: _Entry, now: float) -> None:
        """Updates the measured seconds for a row's work, in batches of the present sizes."""
        seconds = (now - entry.step_began) / entry.row.work
        known = self._seconds_per_work or seconds
        self._seconds_per_work = known + _SPEED_WEIGHT * (seconds - known)

    def _remove(self, key: Key) -> None:
        del self._entries[key]
        self._work_of_tenant.evict(self._present())

    def _present(self) -> set[str]:
        return {entry.row.tenant for entry in self._entries.values()}
