"""Gives a job whose Generate call broke a grace period, then cancels it.

A server cannot distinguish a caller who left from a connection that broke. So the api whose call
broke starts a grace period and notifies all apis. A stream of the job that is open, or opens, at
any of them ends the grace period. The other apis wait a little longer and cancel the job if the
first api has not settled it: it may have been stopped or killed. See
docs/adr/0010-who-ends-a-job.md.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from img2img_server import errors
from img2img_server.api.cancel import Canceller
from img2img_server.api.deps import ApiDeps
from img2img_server.domain.job import TERMINAL_STATES
from img2img_server.interfaces.queue import StreamNotice, StreamState
from img2img_server.interfaces.records import Stored

_ANSWER_SECONDS: Final = 0.5  # seconds that apis have to report that they stream a job
# seconds that the other apis wait longer; a random time up to the same length is added
_SUCCESSOR_SECONDS: Final = 3.0
_RETRY_SECONDS: Final = 2.0
_TRIES: Final = 30

log = structlog.get_logger()


class Disconnects:
    """Keeps the open streams of this api and the grace periods of all apis.

    Methods that are not coroutines return at once; the tasks that they start end with `listening`.
    """

    def __init__(self, deps: ApiDeps, canceller: Canceller) -> None:
        self._canceller = canceller
        self._control = deps.bus.control
        self._stop = deps.stop
        self._grace_seconds = deps.settings.disconnect_grace_seconds
        self._streams: Counter[int] = Counter()  # open streams by job
        self._graces: dict[int, asyncio.Task[None]] = {}  # the grace-period tasks by job
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Receives the notices of other apis during the body. Raises UnavailableError on entry."""
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
        if jobs := sorted(self._graces):
            log.info("grace_periods_left_to_other_apis", jobs=jobs)
        for job_id in jobs:
            self._end_grace(job_id)

    def opened(self, tenant: str, job_id: int) -> None:
        """Counts a stream of the job, which its tenant opened here; ends its grace period."""
        self._streams[job_id] += 1
        if self._end_grace(job_id):
            self._spawn(self._notify(StreamState.SETTLED, tenant, job_id))

    def closed(self, job_id: int) -> None:
        """Counts a stream that was opened here as closed."""
        self._streams[job_id] -= 1
        if not self._streams[job_id]:
            del self._streams[job_id]

    def broke(self, tenant: str, job_id: int, *, reason: str = "") -> None:
        """Handles a Generate call that ended before its job did.

        Args:
            reason: why the job is cancelled at once, for the log; empty: after a grace period.
        """
        if self._stop.is_set():  # The server ended the call.
            return
        if not reason and self._streams[job_id]:
            return
        if reason or not self._grace_seconds:
            self._spawn(self._cancel(tenant, job_id, reason or "disconnected"))
        else:
            self._start_grace(tenant, job_id, self._grace_seconds, is_own=True)

    async def _receive(self, notice: StreamNotice) -> None:
        job_id = notice.job_id
        if notice.state is StreamState.SETTLED:
            self._end_grace(job_id)
        elif self._streams[job_id]:
            await self._notify(StreamState.SETTLED, notice.tenant, job_id)
        elif notice.state is StreamState.BROKEN and job_id not in self._graces:
            self._start_grace(notice.tenant, job_id, notice.grace_seconds, is_own=False)

    def _start_grace(self, tenant: str, job_id: int, seconds: float, *, is_own: bool) -> None:
        self._end_grace(job_id)
        self._graces[job_id] = self._spawn(self._grace(tenant, job_id, seconds, is_own))

    def _end_grace(self, job_id: int) -> bool:
        grace = self._graces.pop(job_id, None)
        return grace is not None and grace.cancel()

    async def _grace(self, tenant: str, job_id: int, seconds: float, is_own: bool) -> None:
        """Cancels the job after the grace period, unless `_end_grace` cancels this task before."""
        ends_at = time.monotonic() + seconds
        if is_own:
            log.info("generate_disconnected", job=job_id, grace_seconds=seconds)
            await self._notify(StreamState.BROKEN, tenant, job_id, seconds)
        else:
            ends_at += _SUCCESSOR_SECONDS * (1.0 + random.random())  # noqa: S311 - spreads load
        await asyncio.sleep(ends_at - time.monotonic())
        # Asks again, because a notice that was sent while NATS was unavailable is lost.
        await self._notify(StreamState.SOUGHT, tenant, job_id)
        await asyncio.sleep(_ANSWER_SECONDS)
        del self._graces[job_id]  # A cancel must not be interrupted.
        await self._cancel(tenant, job_id, "disconnected")
        await self._notify(StreamState.SETTLED, tenant, job_id)

    async def _cancel(self, tenant: str, job_id: int, reason: str) -> None:
        for _ in range(_TRIES):
            try:
                await self._canceller.cancel(tenant, job_id)
            except errors.UnavailableError:
                await asyncio.sleep(_RETRY_SECONDS)
            except errors.ServiceError:
                return  # The job has ended meanwhile.
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
        # Without a reference, asyncio might garbage-collect the running task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass(slots=True, kw_only=True)
class GenerateCall:
    """One Generate call from its start to its end.

    `creation`: creates the job, also after the call has ended. `detach`: the job continues when the
    call ends. `is_repeatable`: the request has an id, by which the caller can ask for the job
    again. `remaining_seconds`: the time until the call's deadline, if it has one. `has_ended`: the
    terminal event or an error of the service was sent.
    """

    disconnects: Disconnects
    creation: asyncio.Task[Stored]
    detach: bool
    is_repeatable: bool
    remaining_seconds: float | None
    has_ended: bool = False
    _started_at: float = field(default_factory=time.monotonic)
    _is_open: bool = False
    _is_named: bool = False

    def opened(self, tenant: str, job_id: int) -> None:
        """Records that the job exists and its stream begins."""
        self._is_open = True
        self.disconnects.opened(tenant, job_id)

    def sends(self, kind: str | None) -> None:
        """Records the kind of the next event, which gives the caller the job's name or its end."""
        self._is_named = True
        self.has_ended |= kind in TERMINAL_STATES

    def done(self) -> None:
        """Handles the end of the call, which gRPC reports."""
        is_overdue = self._is_overdue()
        self.creation.add_done_callback(lambda creation: self._settle(creation, is_overdue))

    def _is_overdue(self) -> bool:
        if (seconds := self.remaining_seconds) is None:
            return False
        # The caller's clock ends the call, perhaps before ours: gRPC rounds deadlines up by 1 %.
        slack = max(0.1, min(1.0, 0.1 * seconds), 0.01 * seconds)
        return time.monotonic() >= self._started_at + seconds - slack

    def _settle(self, creation: asyncio.Task[Stored], is_overdue: bool) -> None:
        if creation.cancelled() or creation.exception() is not None:
            return
        job = creation.result().job
        if self._is_open:
            self.disconnects.closed(job.id)
        if self.has_ended or self.detach:
            return
        reason = ""
        if is_overdue:
            reason = "deadline_passed"
        elif not (self._is_named or self.is_repeatable):
            reason = "disconnected_without_job_name"
        self.disconnects.broke(job.tenant, job.id, reason=reason)
