"""Shows callers why a job waits: its worker is lost, or no worker serves its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from img2img_server.domain.job import Job, State, StateReason
from img2img_server.domain.models import WorkerInfo
from img2img_server.domain.warnings import join_warnings
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


async def as_seen(
    job: Job, workers: WorkerRegistry, retention_hours: float, *, is_fresh: bool = True
) -> Job:
    """Returns the job as callers see it. Its record stays as it is, since workers come and go.

    A job whose worker is lost is queued, because another worker will start it again. A queued job
    whose model no worker serves has a warning.

    Args:
        retention_hours: The longest time that a job waits.
        is_fresh: Reads the announcements again if no remembered worker serves.
    """
    if await is_lost(job, workers):
        reason = StateReason.WORKER_LOST
        job = replace(job, state=State.QUEUED, state_reason=reason, start_time=0.0)
    if job.state is not State.QUEUED:
        return job
    try:
        if is_fresh:  # A registry with a cache reads again if no worker serves.
            await workers.workers()
        announced = await workers.announced()
    except UnavailableError:
        return job
    ends_at = job.create_time + retention_hours * 3600
    if not (warning := unserved_warning(job.params.model, announced, ends_at)):
        return job
    return replace(
        job,
        warning=join_warnings(job.warning, warning),
        state_reason=job.state_reason or StateReason.MODEL_UNSERVED,
    )


def unserved_warning(model: str, announced: Sequence[WorkerInfo], ends_at: float) -> str:
    """Returns the sentences for a job whose model no worker serves now; empty if one does.

    Args:
        announced: All workers, also those that could not load their model.
        ends_at: Unix time at which the job fails if no worker has started it.
    """
    of_model = [worker for worker in announced if worker.model.name == model]
    if any(worker.serves for worker in of_model):
        return ""
    limit = f"until {datetime.fromtimestamp(ends_at, UTC):%Y-%m-%d %H:%M} UTC at most"
    if any(worker.failure for worker in of_model):
        # The reasons name files of the operator; warnings also reach the callers of gateways.
        state = f"No worker can load the model {model} now; Model.load_failures says why."
        return f"{state} The job waits until one can, {limit}."
    return f"No worker serves the model {model} now. The job waits until one does, {limit}."
