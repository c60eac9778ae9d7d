"""Job records: of calls about one job, and of calls that go through many."""

from __future__ import annotations

import structlog

from img2img_server import errors
from img2img_server.interfaces.records import JobStore, Stored, UnreadableError

UNREADABLE = "The job's record cannot be read by this server."

log = structlog.get_logger()


async def known(jobs: JobStore, tenant: str, job_id: int) -> Stored | None:
    """The record of the job that a call is about, or None when there is none.

    Raises:
        UnavailableError: also when it cannot be read: it may be that of a later version, which
            another api knows.
    """
    try:
        return await jobs.get(tenant, job_id)
    except UnreadableError as error:
        log.error("job record cannot be read", job=job_id, error=str(error))
        raise errors.UnavailableError(UNREADABLE) from error


async def found(jobs: JobStore, tenant: str, job_id: int) -> Stored:
    """The record of the job that a call is about.

    Raises:
        JobNotFoundError, UnavailableError.
    """
    stored = await known(jobs, tenant, job_id)
    if stored is None:
        raise errors.JobNotFoundError(f"jobs/{job_id}")
    return stored


async def readable(jobs: JobStore, tenant: str, job_id: int) -> Stored | None:
    """The record, or None when there is none or it cannot be read: it must not hide all others.

    Raises:
        UnavailableError.
    """
    try:
        return await jobs.get(tenant, job_id)
    except UnreadableError as error:
        log.warning("job record skipped, it cannot be read", job=job_id, error=str(error))
        return None
