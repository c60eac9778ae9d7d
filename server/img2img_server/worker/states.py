"""Stores the states of suspended jobs, and reads them again."""

from __future__ import annotations

import asyncio
import hashlib

import structlog

from img2img_server import clock, errors
from img2img_server.domain.job import Job, Suspended
from img2img_server.engine.base import JobState, StateError
from img2img_server.interfaces.states import StateTooLargeError
from img2img_server.nats import codec
from img2img_server.worker.deps import WorkerDeps

STORE_SECONDS = 3.0  # longest time to store a state; a worker that stops has no more
# A worker that cannot continue a job leaves it to others for this time, and requeues it after a
# pause each time it gets it.
OTHERS_SECONDS = 2.0
OTHERS_PAUSE_SECONDS = 0.2

log = structlog.get_logger()


async def store_state(deps: WorkerDeps, job: Job, state: JobState) -> Suspended | None:
    """Stores the state of a job and returns its place; None if it cannot be stored."""
    suspended_at = clock.now()
    data = codec.encode(state)
    try:
        async with asyncio.timeout(STORE_SECONDS):
            key = await deps.states.save(job.id, data)
    except (StateTooLargeError, errors.UnavailableError, TimeoutError) as error:
        log.warning("job_state_not_stored", size_bytes=len(data), why=str(error))
        return None
    return Suspended(
        key=key,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        state_key=state.state_key,
        time=suspended_at,
        done_steps=tuple(state.steps.get(index, 0) for index in range(job.params.samples)),
    )


async def load_state(deps: WorkerDeps, job: Job) -> JobState | None:
    """Returns the state of a suspended job; None if this worker cannot continue from it.

    Raises:
        UnavailableError: NATS is down.
    """
    if job.suspended is None:
        return None
    try:
        return await _loaded(deps, job, job.suspended)
    except StateError as error:
        log.warning("job_state_unusable", why=str(error))
        return None


async def _loaded(deps: WorkerDeps, job: Job, suspended: Suspended) -> JobState:
    if suspended.state_key != deps.engine.state_key:
        raise StateError("it is of another model, device or version")
    data = await deps.states.load(suspended.key, suspended.size)
    if data is None:
        raise StateError("it has expired")
    if hashlib.sha256(data).hexdigest() != suspended.sha256:
        raise StateError("it is damaged")
    try:
        state = codec.decode(data, JobState)
    except codec.UndecodableError as error:
        raise StateError("it cannot be decoded") from error
    if (state.job_id, state.tenant) != (job.id, job.tenant):
        raise StateError("it belongs to another job")
    return state


def is_for_others(deps: WorkerDeps, job: Job) -> bool:
    """Returns whether another kind of worker may still come for a job that was suspended now."""
    suspended = job.suspended
    if suspended is None or suspended.state_key == deps.engine.state_key:
        return False
    return clock.now() - suspended.time < OTHERS_SECONDS
