"""Which samples take the next denoising step together. Pure: no torch, no clock, no threads.

A sample is a row. Rows join and leave at every step. Each batch holds rows of one
batch key only (one size in most families, one adapter), and is put together anew for each step, in
this order:

1. rows that have waited for longer than `max_wait_seconds`, longest wait first;
2. the realtime lane before the batch lane;
3. the tenant that has had the least work (pixels x forwards) before the others;
4. rows that will soon miss their deadline;
5. the row with the largest age / (remaining work)^2: among equals the older one first, and a short
   job does not wait for a long one. The square is there because with the plain ratio all jobs are
   slowed alike, and a short one behind long ones would be as slow as they are, times its length.

The first row in this order fixes the bucket. Others of that bucket join as long as that pays: every
row of a batch waits for all of its rows, but what a step costs beyond its rows is paid once, and
that is time saved for those that join and those that wait on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from img2img_server.domain.params import Lane
from img2img_server.engine.fair_share import FairShare

Key = tuple[int, int]  # job id, sample

_LANE_ORDER = {Lane.REALTIME: 0, Lane.BATCH: 1}
# Added to every age: a short row that has just come goes before a long one at once.
_HEAD_START_SECONDS = 0.1
# A row is urgent when less than this many times the time that it needs is left.
_URGENT_RATIO = 2.0
_PACE_WEIGHT = 0.2
_LIMIT_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample to denoise.

    `forwards`: what each of its steps costs; 2 with guidance, since the unguided prediction is a
    forward of its own. `steps`: how many it still needs, at least 1. `batch_key`: rows with
    different ones share no batch. `deadline`: when its picture is of no more use, of the same clock
    as `enqueue_time`; None: never.
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
        """Pixels x forwards of one step."""
        return self.height * self.width * self.forwards


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows with one batch key that take their next step together."""

    rows: tuple[Row, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the largest row: smaller ones are padded to it, if they differ."""
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


class Scheduler:
    """Picks the rows of every step.

    Args:
        max_batch_size: the largest batch, in forwards. A row that costs more than that runs alone.
        fixed_step_cost: what a step costs beyond its rows, in pixels x forwards; None: a larger
            batch is always worthwhile, as on a GPU.
        max_wait_seconds: a row that has waited for so long since its last step goes before every
            row that has not. Then no more than the rows before it in that line run first.
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
        self._limits: dict[tuple[int, int], tuple[int, float]] = {}  # forwards, until when
        self._entries: dict[Key, _Entry] = {}
        self._work_of_tenant = FairShare()
        self._seconds_per_work = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, row: Row, now: float) -> None:
        """Takes a row in. Its key must be new."""
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
        """Bounds the forwards of batches of this size for a while. A single row always runs."""
        most = min(forwards, self._limit(height, width, now))
        self._limits[height, width] = most, now + _LIMIT_SECONDS

    def next_batch(self, now: float) -> Batch | None:
        """The rows that step next; None when no row can. Each stays in flight until `complete`."""
        line = sorted(
            (entry for entry in self._entries.values() if not entry.in_flight),
            key=lambda entry: self._order(entry, now),
        )
        if not line:
            return None
        chosen = self._choose(line, now)
        for entry in chosen:
            entry.in_flight, entry.step_began = True, now
        return Batch(tuple(entry.row for entry in chosen))

    def put_back(self, keys: Iterable[Key]) -> None:
        """Takes rows of a batch that did not run after all; they wait as long as they have."""
        for key in keys:
            if entry := self._entries.get(key):
                assert entry.in_flight
                entry.in_flight = False

    def complete(self, keys: Iterable[Key], now: float) -> tuple[Key, ...]:
        """Counts a step of each row; returns those that are finished, and removes them.

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
            self._note_pace(entry, now)
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
        """The head of the line, and who joins it."""
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
        """Whether a row's joining saves it and those that wait on more than it costs the chosen,
        who pay for the step in any case."""
        if self._fixed_step_cost is None:
            return True
        return (waiting - chosen) * self._fixed_step_cost > chosen * row.work

    def _order(self, entry: _Entry, now: float) -> tuple[float, ...]:
        row = entry.row
        if now - entry.waiting_since > self._max_wait_seconds:
            return (0, entry.waiting_since, row.job_id, row.sample)
        lane, work = _LANE_ORDER[row.lane], self._work_of_tenant[row.tenant]
        age = max(0.0, now - row.enqueue_time) + _HEAD_START_SECONDS
        score = age / entry.work_left**2
        patience = 0 if self._is_urgent(entry, now) else 1
        return (1, lane, work, patience, -score, row.enqueue_time, row.job_id, row.sample)

    def _is_urgent(self, entry: _Entry, now: float) -> bool:
        """Whether it must run now to be in time. A deadline that has passed hurries nobody."""
        if entry.row.deadline is None:
            return False
        left = entry.row.deadline - now
        return 0 < left < _URGENT_RATIO * entry.work_left * self._seconds_per_work

    def _note_pace(self, entry: _Entry, now: float) -> None:
        """Learns how long the work of a row takes, in the company that it has."""
        seconds = (now - entry.step_began) / entry.row.work
        known = self._seconds_per_work or seconds
        self._seconds_per_work = known + _PACE_WEIGHT * (seconds - known)

    def _remove(self, key: Key) -> None:
        del self._entries[key]
        self._work_of_tenant.evict(self._present())

    def _present(self) -> set[str]:
        return {entry.row.tenant for entry in self._entries.values()}
