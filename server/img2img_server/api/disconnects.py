"""Gives a job whose Generate call broke a grace period, then cancels it.

A server cannot tell a caller who left from a connection that broke. So the api whose call broke
starts a grace period and tells all apis. A stream of the job that is open, or opens, at any of them
ends the grace period. The other apis wait a little longer and cancel the job only if the first api
has not done so: it may have been stopped or killed. See docs/adr/0010-who-ends-a-job.md.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from img2img.v1 import event_pb2
from img2img_server import errors
from img2img_server.api.cancel import Canceller
from img2img_server.api.records import known
from img2img_server.interfaces.queue import Control, StreamNotice, StreamState
from img2img_server.interfaces.records import JobStore, Stored

_ANSWER_SECONDS: Final = 0.5  # how long apis may take to say that they stream a job
_SUCCESSOR_SECONDS: Final = 3.0  # what the other apis wait longer, and as much again at random
_RETRY_SECONDS: Final = 2.0
_TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
_TRIES: Final = 30

log = structlog.get_logger()


@dataclass(slots=True)
class _Grace:
    """A grace period that runs. `taken_over` ends it."""

    tenant: str
    taken_over: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Disconnects:
    """Knows the open streams of this api and the grace periods of all apis.

    Every method that is no coroutine returns at once; what it starts ends with `listening`.
    """

    def __init__(
        self,
        jobs: JobStore,
        canceller: Canceller,
        control: Control,
        stop: asyncio.Event,
        *,
        grace_seconds: float,
    ) -> None:
        self._jobs = jobs
        self._canceller = canceller
        self._control = control
        self._stop = stop
        self._grace_seconds = grace_seconds
        self._streams: Counter[int] = Counter()  # open streams by job
        self._generates: Counter[int] = Counter()  # those of them that are Generate calls
        self._graces: dict[int, _Grace] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Hears the other apis during the body. Raises UnavailableError on entering."""
        try:
            async with self._control.on_notice(self._receive):
                yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def end_grace_periods_at_stop(self) -> None:
        """Waits until the server stops, then leaves its grace periods to the other apis.

        Callers cannot come back to a server that stops, so it must not cancel their jobs.
        """
        await self._stop.wait()
        if self._graces:
            log.info("grace_periods_left_to_other_apis", jobs=sorted(self._graces))
        for grace in self._graces.values():
            if grace.task is not None:
                grace.task.cancel()

    def opened(self, tenant: str, job_id: int, *, generate: bool = False) -> None:
        """A stream of the job was opened here by a caller of this tenant; ends a grace period."""
        self._streams[job_id] += 1
        self._generates[job_id] += generate
        grace = self._graces.get(job_id)
        if grace is not None and not grace.taken_over.is_set():
            grace.taken_over.set()
            self._spawn(self._notify(StreamState.OPEN, tenant, job_id))

    def closed(self, job_id: int, *, generate: bool = False) -> None:
        """A stream of the job that was opened here has ended, for whatever reason."""
        self._streams[job_id] -= 1
        self._generates[job_id] -= generate
        for counter in (self._streams, self._generates):
            if not counter[job_id]:
                del counter[job_id]

    def broke(self, tenant: str, job_id: int, *, reason: str = "") -> None:
        """A Generate call of the job ended before the job did.

        Args:
            reason: why the job is cancelled at once, for the log; empty: after a grace period.
        """
        # A stopping server is not a caller who left, nor is one of two calls of the same request.
        if self._stop.is_set() or self._generates[job_id]:
            return
        if reason:
            self._spawn(self._cancel(tenant, job_id, reason))
        elif self._streams[job_id]:
            return  # a WatchJob call has taken over
        elif not self._grace_seconds:
            self._spawn(self._cancel(tenant, job_id, "disconnected"))
        else:
            self._start(tenant, job_id, self._grace_seconds, is_ours=True)

    async def _receive(self, notice: StreamNotice) -> None:
        job_id, grace = notice.job_id, self._graces.get(notice.job_id)
        if notice.state is StreamState.OPEN:
            if grace is not None and grace.tenant == notice.tenant:
                grace.taken_over.set()
        elif self._streams[job_id]:
            await self._notify(StreamState.OPEN, notice.tenant, job_id)
        elif notice.state is StreamState.BROKEN and grace is None:
            self._start(notice.tenant, job_id, notice.grace_seconds, is_ours=False)

    def _start(self, tenant: str, job_id: int, seconds: float, *, is_ours: bool) -> None:
        grace = self._graces[job_id] = _Grace(tenant)
        grace.task = self._spawn(self._run(grace, job_id, seconds, is_ours))

    async def _run(self, grace: _Grace, job_id: int, seconds: float, is_ours: bool) -> None:
        try:
            ends_at = time.monotonic() + seconds
            if is_ours:
                log.info("generate_disconnected", job=job_id, grace_seconds=seconds)
                await self._notify(StreamState.BROKEN, grace.tenant, job_id, seconds)
            else:
                ends_at += _SUCCESSOR_SECONDS * (1.0 + random.random())  # noqa: S311 - spreads load
            if await _is_taken_over(grace, ends_at - time.monotonic()):
                return
            if not await self._is_to_be_cancelled(grace.tenant, job_id):
                return
            # Asked again: a notice that was sent while NATS was away is lost.
            await self._notify(StreamState.SOUGHT, grace.tenant, job_id)
            if await _is_taken_over(grace, _ANSWER_SECONDS):
                return
            await self._cancel(grace.tenant, job_id, "disconnected")
        finally:
            if self._graces.get(job_id) is grace:
                del self._graces[job_id]

    async def _is_to_be_cancelled(self, tenant: str, job_id: int) -> bool:
        """Whether the job has neither ended nor been cancelled by somebody else."""
        with suppress(errors.UnavailableError):  # then the cancel is tried for a while
            stored = await known(self._jobs, tenant, job_id)
            return stored is not None and not (
                stored.job.state.is_terminal or stored.job.cancel_requested
            )
        return True

    async def _cancel(self, tenant: str, job_id: int, reason: str) -> None:
        for _ in range(_TRIES):
            try:
                await self._canceller.cancel(tenant, job_id)
            except errors.UnavailableError:
                await asyncio.sleep(_RETRY_SECONDS)
            except errors.ServiceError:
                return  # it has ended meanwhile
            else:
                log.info("job_cancelled", job=job_id, reason=reason)
                return
        log.warning("job_not_cancelled", job=job_id, reason=reason, error="NATS is unavailable")

    async def _notify(
        self, state: StreamState, tenant: str, job_id: int, seconds: float = 0.0
    ) -> None:
        notice = StreamNotice(state=state, tenant=tenant, job_id=job_id, grace_seconds=seconds)
        try:
            await self._control.notify(notice)
        except errors.UnavailableError as error:
            log.warning("stream_notice_not_sent", job=job_id, state=state.value, error=str(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # or it could be collected while it runs
        task.add_done_callback(self._tasks.discard)
        return task


class GenerateCall:
    """One Generate call from its start to its end, whoever ends it.

    Args:
        creation: makes the job; it goes on when the call has ended.
        detach: the end of the call does not touch the job.
        is_repeatable: the request has an id, by which the caller can ask for the job again.
        remaining_seconds: until the call's deadline; None: it has none.
    """

    def __init__(
        self,
        disconnects: Disconnects,
        creation: asyncio.Task[Stored],
        *,
        detach: bool,
        is_repeatable: bool,
        remaining_seconds: float | None,
    ) -> None:
        self._disconnects = disconnects
        self.creation = creation
        self._detach = detach
        self._is_repeatable = is_repeatable
        self._due_at: float | None = None
        if remaining_seconds is not None:
            self._due_at = time.monotonic() + remaining_seconds - _slack(remaining_seconds)
        self._is_open = False
        self._is_named = False
        self.has_ended = False  # the job's end was sent, or an error of ours

    def opened(self, tenant: str, job_id: int) -> None:
        """The job exists and its stream begins."""
        self._is_open = True
        self._disconnects.opened(tenant, job_id, generate=True)

    def sends(self, event: event_pb2.JobEvent) -> None:
        """An event is about to be sent: the caller may know the job's name, or its end."""
        self._is_named = True
        if event.WhichOneof("event") in _TERMINAL:
            self.has_ended = True

    def done(self) -> None:
        """gRPC has ended the call."""
        is_overdue = self._due_at is not None and time.monotonic() >= self._due_at
        self.creation.add_done_callback(lambda creation: self._settle(creation, is_overdue))

    def _settle(self, creation: asyncio.Task[Stored], is_overdue: bool) -> None:
        if creation.cancelled() or creation.exception() is not None:
            return
        job = creation.result().job
        if self._is_open:
            self._disconnects.closed(job.id, generate=True)
        if self.has_ended or self._detach:
            return
        reason = ""
        if is_overdue:
            reason = "deadline_passed"
        elif not (self._is_named or self._is_repeatable):
            reason = "disconnected_without_job_name"
        self._disconnects.broke(job.tenant, job.id, reason=reason)


def _slack(remaining_seconds: float) -> float:
    """How long before a deadline the end of a call means that the deadline has passed.

    The caller's clock ends the call, and may be early: gRPC rounds deadlines up by 1 % at most.
    """
    return max(0.1, min(1.0, 0.1 * remaining_seconds), 0.01 * remaining_seconds)


async def _is_taken_over(grace: _Grace, seconds: float) -> bool:
    """Waits until the grace period is ended by a stream, for so many seconds at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await grace.taken_over.wait()
    return grace.taken_over.is_set()
