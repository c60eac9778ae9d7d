"""Cancels jobs: queued jobs end here, running jobs at the next step of their worker."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img_server import clock, errors
from img2img_server.api.records import found, readable
from img2img_server.api.waiting_jobs import is_lost
from img2img_server.domain.events import Cancelled, Failed
from img2img_server.domain.job import LAST_JOB_ID, Job, State, advance, terminal_event
from img2img_server.interfaces.queue import OwnershipLostError
from img2img_server.interfaces.records import ConflictError
from img2img_server.interfaces.states import remove_state
from img2img_server.nats.bus import Bus
from img2img_server.webhooks.record import announce

_TRIES = 10
_AT_ONCE = 32  # most records that are read together

log = structlog.get_logger()


class Canceller:
    """Cancels queued and running jobs, and clears queues."""

    def __init__(self, bus: Bus) -> None:
        self._jobs = bus.jobs
        self._queue = bus.queue
        self._permits = bus.permits
        self._events = bus.events
        self._control = bus.control
        self._outbox = bus.outbox
        self._workers = bus.workers
        self._states = bus.states

    async def cancel(self, tenant: str, job_id: int) -> Job:
        """Cancels a job and returns it: cancelled, or running until its next step.

        A job whose worker is lost ends at once.

        Raises JobNotFoundError, JobEndedError, UnavailableError.
        """
        for _ in range(_TRIES):
            stored = await found(self._jobs, tenant, job_id)
            job = stored.job
            if job.state is State.CANCELLED:
                await self._ensure_terminal_event(job)
                return job
            if job.state.is_terminal:
                raise errors.JobEndedError(job.name, job.state)
            with suppress(ConflictError):  # The record has changed: read it again.
                if await is_lost(job, self._workers):
                    # The message stays in the queue: the next worker deletes the job's files.
                    job = replace(job, queue_sequence=0)
                    return await self._end(job, stored.revision, Cancelled())
                if job.state is State.QUEUED:
                    return await self._end(job, stored.revision, Cancelled())
                return await self._ask(job, stored.revision)
        raise errors.UnavailableError(f"jobs/{job_id} changes too fast to be cancelled.")

    async def clear(self, tenant: str) -> int:
        """Ends every queued job of the tenant as failed; returns their number.

        Raises:
            UnavailableError: Some of the jobs may have ended.
        """
        cleared, before = 0, LAST_JOB_ID + 1
        while ids := await self._jobs.list_ids(tenant, before, _AT_ONCE):
            cleared += sum(await asyncio.gather(*(self._clear(tenant, each) for each in ids)))
            before = ids[-1]
        return cleared

    async def _clear(self, tenant: str, job_id: int) -> bool:
        return await self._fail(tenant, job_id, errors.QueueClearedError())

    async def expire(self, tenant: str, job_id: int, hours: int) -> bool:
        """Ends a job as failed if it waits, because it has waited for so many hours. Returns
        whether it has ended now.

        Raises UnavailableError.
        """
        error = errors.QueueExpiredError(hours)
        stored = await readable(self._jobs, tenant, job_id)
        if stored and stored.job.failure and stored.job.failure.reason == error.reason:
            await self._finish(stored.job)  # An api stopped before it had finished this end.
            return False
        return await self._fail(tenant, job_id, error, and_lost=True)

    async def _fail(
        self, tenant: str, job_id: int, error: errors.JobFailedError, *, and_lost: bool = False
    ) -> bool:
        """Ends a queued job as failed; with `and_lost`, also one whose worker is lost."""
        event = Failed(reason=error.reason, message=str(error), retryable=error.retryable)
        for _ in range(_TRIES):
            stored = await readable(self._jobs, tenant, job_id)
            if stored is None:
                return False
            job = stored.job
            if and_lost and await is_lost(job, self._workers):
                # The message stays in the queue: the next worker deletes the job's files.
                job = replace(job, queue_sequence=0)
            elif job.state is not State.QUEUED:
                return False
            with suppress(ConflictError):  # The record has changed: read it again.
                await self._end(job, stored.revision, event)
                return True
        raise errors.UnavailableError(f"jobs/{job_id} changes too fast to be ended.")

    async def _end(self, job: Job, revision: int, event: Cancelled | Failed) -> Job:
        job = advance(job, event, clock.now())
        await self._jobs.update(job, revision)
        await self._finish(job)
        log.info("queued_job_ended", job=job.id, state=job.state)
        return job

    async def _finish(self, job: Job) -> None:
        """Does what follows the end of a queued job, unless it is done."""
        await self._ensure_terminal_event(job)
        if job.queue_sequence:
            await self._queue.remove(job.queue_sequence)
        with suppress(errors.UnavailableError):  # A permit that stays is found when it is needed.
            await self._permits.release(job.permit)
        await remove_state(self._states, job.suspended)

    async def _ensure_terminal_event(self, job: Job) -> None:
        """Appends the terminal event and queues the webhook, unless a worker owns the log."""
        with suppress(OwnershipLostError):
            writer = await self._events.open(job.id, tenant=job.tenant)
            writer.continue_after(job.used_number(writer.sequence))
            if not writer.ended:
                await announce(self._outbox, self._jobs, job)
                await writer.append(terminal_event(job))

    async def _ask(self, job: Job, revision: int) -> Job:
        if not job.cancel_requested:  # The stored request survives the worker's death.
            job = replace(job, cancel_requested=True)
            await self._jobs.update(job, revision)
        await self._control.cancel(job.id)
        return job
