"""Cancelling: a queued job ends here, a running one is told to end at its next step."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img_server import errors
from img2img_server.domain.events import Cancelled
from img2img_server.domain.job import Job, State, advance
from img2img_server.queue.base import Control, EventLog, JobQueue, OwnershipLostError
from img2img_server.store.base import ConflictError, JobStore

_TRIES = 10

log = structlog.get_logger()


class Canceller:
    """Cancels jobs, whoever has them."""

    def __init__(self, jobs: JobStore, queue: JobQueue, events: EventLog, control: Control) -> None:
        self._jobs = jobs
        self._queue = queue
        self._events = events
        self._control = control

    async def cancel(self, tenant: str, job_id: int) -> Job:
        """Returns the job: cancelled, or running until its next step.

        Raises:
            JobNotFoundError, JobEndedError, UnavailableError.
        """
        for _ in range(_TRIES):
            stored = await self._jobs.get(tenant, job_id)
            if stored is None:
                raise errors.JobNotFoundError(f"jobs/{job_id}")
            job = stored.job
            if job.state is State.CANCELLED:
                return job
            if job.state.is_terminal:
                raise errors.JobEndedError(job.name, job.state)
            with suppress(ConflictError):  # it moved on under us: look again
                if job.state is State.QUEUED:
                    return await self._end(job, stored.revision)
                return await self._ask(job, stored.revision)
        raise errors.UnavailableError(f"jobs/{job_id} changes too fast to be cancelled.")

    async def _end(self, job: Job, revision: int) -> Job:
        event = Cancelled()
        job = advance(job, event, time.time())
        await self._jobs.update(job, revision)
        if job.queue_sequence:
            await self._queue.remove(job.queue_sequence)
        # A worker that has just taken the message sees the record and says the last word itself.
        with suppress(OwnershipLostError):
            writer = await self._events.open(job.id)
            if not writer.ended:
                await writer.append(event)
        log.info("job cancelled", job=job.id, state="queued")
        return job

    async def _ask(self, job: Job, revision: int) -> Job:
        if not job.cancel_requested:  # survives the worker's death
            job = replace(job, cancel_requested=True)
            await self._jobs.update(job, revision)
        await self._control.cancel(job.id)
        return job
