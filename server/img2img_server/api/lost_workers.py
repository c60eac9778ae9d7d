"""Jobs whose worker is lost: they are queued, although their record says that they run."""

from __future__ import annotations

from dataclasses import replace

from img2img_server.domain.job import Job, State, StateReason
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.records import WorkerRegistry


async def is_lost(job: Job, workers: WorkerRegistry) -> bool:
    """Returns whether the job runs on a worker that does not announce itself any more."""
    if job.state is not State.RUNNING:
        return False
    try:
        return job.worker not in await workers.names()
    except UnavailableError:
        return False


async def as_seen(job: Job, workers: WorkerRegistry) -> Job:
    """Returns the job as callers see it: queued if its worker is lost, since another worker will
    start it again.
    """
    if not await is_lost(job, workers):
        return job
    return replace(job, state=State.QUEUED, state_reason=StateReason.WORKER_LOST, start_time=0.0)
