"""Decides which queued jobs a worker pulls, and when each pulled job begins.

A pulled job *waits* until the engine would run it in its next step; until then other workers may
have it. Then it has *begun*, and its attempt counts. Once its images are computed it *finishes*:
the safety check and the upload need no device.

See docs/adr/0014-where-jobs-wait.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

from img2img_server.domain.params import Lane
from img2img_server.engine.base import Engine, JobPlan
from img2img_server.interfaces.queue import QueueSource
from img2img_server.telemetry import JOBS_RUNNING
from img2img_server.worker.usage import FleetUsage

# A source that has not been served for this long goes before all others.
MAX_WAIT_SECONDS: Final = 30.0
# Begun jobs that do not fit the next step because others go first. Above, no further job may be
# pulled to go before them.
MOST_PAUSED: Final = 3
# Samples that are checked, encoded and uploaded. Above, no job is pulled. Files that wait for the
# store have a limit of their own, by bytes (storage/watched_blobs.py).
MOST_FINISHING_SAMPLES: Final = 256
MOST_AT_ONCE: Final = 8  # jobs of one pull
# After a worker has requeued a waiting job for an idle worker, it takes no job ahead for this time.
REQUEUE_PAUSE_SECONDS: Final = 1.0
FIRST_ALONE_ATTEMPT: Final = 3  # From this attempt on, a job runs alone on its worker.

_TIMER_SECONDS: Final = 0.01  # A timer of the event loop may fire this much too early.

_LANE_ORDER: Final = {Lane.REALTIME: 0, Lane.BATCH: 1}


class Phase(Enum):
    """The phase of a pulled job on its worker."""

    WAITS = auto()
    HAS_BEGUN = auto()
    FINISHES = auto()


@dataclass(slots=True, eq=False)
class HeldJob:
    """A pulled job. `may_begin` is set once it may be taken and submitted to the engine."""

    plan: JobPlan
    size: int
    is_alone: bool
    phase: Phase = Phase.WAITS
    is_submitted: bool = False
    may_begin: asyncio.Event = field(default_factory=asyncio.Event)


class Dispatcher:
    """The pulled jobs of one worker. `changed` is set whenever other jobs may be pulled."""

    def __init__(
        self, engine: Engine, usage: FleetUsage, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._usage = usage
        self._clock = clock
        self._held: list[HeldJob] = []
        self._unserved: dict[tuple[Lane, int, int], float] = {}  # since when, by source
        self._requeued_at = -REQUEUE_PAUSE_SECONDS
        self._paused_until = 0.0
        self._counted = 0
        self.changed = asyncio.Event()

    def _in(self, *phases: Phase) -> list[HeldJob]:
        return [job for job in self._held if job.phase in phases]

    @property
    def begun(self) -> int:
        """Returns the number of jobs that have begun and whose images are not all computed."""
        return len(self._in(Phase.HAS_BEGUN))

    @property
    def waiting(self) -> int:
        """Returns the number of jobs that have not begun."""
        return len(self._in(Phase.WAITS))

    @property
    def is_idle(self) -> bool:
        """Returns whether no job uses or awaits the device."""
        return not self._in(Phase.WAITS, Phase.HAS_BEGUN)

    def add(self, plan: JobPlan, size: int, attempts: int) -> HeldJob:
        """Adds a pulled job, which begins at once if the engine would run it next.

        Args:
            attempts: the attempts at the job that have counted before.
        """
        job = HeldJob(plan, size, is_alone=attempts + 1 >= FIRST_ALONE_ATTEMPT)
        self._held.append(job)
        self.check()
        return job

    def _count(self) -> None:
        # A worker with several models has a dispatcher for each of them.
        running = len(self._in(Phase.HAS_BEGUN, Phase.FINISHES))
        JOBS_RUNNING.inc(running - self._counted)
        self._counted = running
        self.changed.set()

    def finish(self, job: HeldJob) -> None:
        """Notes that the job needs the device no more."""
        job.phase = Phase.FINISHES
        self.check()
        self._count()

    def remove(self, job: HeldJob, *, requeued: bool = False) -> None:
        """Removes a job that has ended or was requeued."""
        if job in self._held:
            self._held.remove(job)
        if requeued:
            self._requeued_at = self._clock()
        self.check()
        self._count()

    def check(self) -> None:
        """Lets waiting jobs begin that the engine would run in its next step."""
        waiting, begun = self._in(Phase.WAITS), self._in(Phase.HAS_BEGUN)
        if not waiting or any(job.is_alone for job in begun):
            return
        if alone := next((job for job in waiting if job.is_alone), None):
            if len(self._held) == len(waiting):
                self._begin(alone)
            return
        arriving = [job.plan for job in begun if not job.is_submitted]
        chosen = self._engine.next_jobs([*arriving, *(job.plan for job in waiting)])
        for job in waiting:
            if job.plan.job_id in chosen:
                self._begin(job)

    def _begin(self, job: HeldJob) -> None:
        job.phase = Phase.HAS_BEGUN
        job.may_begin.set()
        self._count()

    def pause(self, seconds: float) -> None:
        """Pulls no job for a time, so that other workers get the one that is requeued now."""
        self._paused_until = self._clock() + seconds
        asyncio.get_running_loop().call_later(seconds + _TIMER_SECONDS, self.changed.set)

    @property
    def may_pull(self) -> bool:
        """Returns whether some job may be pulled now."""
        if self._clock() < self._paused_until:
            return False
        if any(job.is_alone for job in self._in(Phase.WAITS, Phase.HAS_BEGUN)):
            return False
        finishing = sum(job.plan.params.samples for job in self._in(Phase.FINISHES))
        return finishing < MOST_FINISHING_SAMPLES and len(self._in(Phase.WAITS)) < 2

    @property
    def most(self) -> int:
        """Returns the number of jobs to pull at once: as many as would take part in the next step
        if they were like the one that began last.
        """
        begun = self._in(Phase.HAS_BEGUN)
        if not begun or self.waiting:
            return 1
        arriving = [job.plan for job in begun if not job.is_submitted]
        copies = [replace(begun[-1].plan, job_id=-number) for number in range(1, MOST_AT_ONCE + 1)]
        chosen = self._engine.next_jobs([*arriving, *copies])
        return max(1, sum(copy.job_id in chosen for copy in copies))

    @property
    def _may_look_ahead(self) -> bool:
        """Returns whether a job may be pulled that will wait for those that have begun."""
        if self.waiting:
            return False
        if self.is_idle:
            return True
        return self._clock() - self._requeued_at >= REQUEUE_PAUSE_SECONDS

    def order(self, sources: Sequence[QueueSource]) -> list[QueueSource]:
        """Returns the sources from which a job may be pulled now, the first one first."""
        now = self._clock()
        self._usage.update_tenants({tenant for source in sources for tenant in source.jobs})
        listed = {source.key for source in sources}
        known = self._unserved
        self._unserved = {key: known.get(key, now) for key in listed}
        if not self.may_pull:
            return []
        if not self._may_look_ahead:
            sources = [source for source in sources if self._goes_first(source)]
        return sorted(sources, key=lambda source: self._rank(source, now))

    def note(self, empty: Sequence[QueueSource], taken: QueueSource | None) -> None:
        """Forgets since when these sources were not served."""
        for source in (*empty, *((taken,) if taken else ())):
            self._unserved.pop(source.key, None)

    def _rank(self, source: QueueSource, now: float) -> tuple[float, ...]:
        since = self._unserved[source.key]
        if now - since > MAX_WAIT_SECONDS:
            return (0.0, since)
        return (1.0, _LANE_ORDER[source.lane], self._level(source), source.size, since)

    def _level(self, source: QueueSource) -> float:
        return min(self._usage.level(tenant) for tenant in source.jobs)

    def _goes_first(self, source: QueueSource) -> bool:
        """Returns whether a job of the source would go before the jobs that are held.

        That is a realtime job before batch jobs, a job of a tenant that has no job here and has had
        no more device time, and a shorter job of a tenant before its longer ones.
        """
        if not self._has_place():
            return False
        held = self._in(Phase.WAITS, Phase.HAS_BEGUN)
        first_lane = min(_LANE_ORDER[job.plan.params.lane] for job in held)
        if _LANE_ORDER[source.lane] != first_lane:
            return _LANE_ORDER[source.lane] < first_lane
        same = [job for job in held if job.plan.params.lane is source.lane]
        here = {job.plan.tenant for job in same}
        if newcomers := source.jobs.keys() - here:
            least = min(self._usage.level(tenant) for tenant in here)
            return min(self._usage.level(tenant) for tenant in newcomers) <= least
        return source.size < min(job.size for job in same if job.plan.tenant in source.jobs)

    def _has_place(self) -> bool:
        begun = self._in(Phase.HAS_BEGUN)
        if not begun:
            return True
        arriving = [job.plan for job in begun if not job.is_submitted]
        running = self._engine.next_jobs(arriving)
        return sum(job.plan.job_id not in running for job in begun) < MOST_PAUSED
