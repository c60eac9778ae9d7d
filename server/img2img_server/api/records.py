"""Reads job records: of one job, and of a page of jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from typing import Final

import structlog

from img2img_server import errors
from img2img_server.domain.job import Job, State
from img2img_server.interfaces.records import JobStore, Stored, UnreadableError

PAGE_READS: Final = 100  # most records that one call reads, equal to the largest page
UNREADABLE = "The job's record cannot be read by this server."

log = structlog.get_logger()


async def known(jobs: JobStore, tenant: str, job_id: int) -> Stored | None:
    """Returns the record of one job, or None if no such job was accepted.

    Raises:
        UnavailableError: Also if the record cannot be decoded, since an api of a later version may
            be able to.
    """
    try:
        return _accepted(await jobs.get(tenant, job_id))
    except UnreadableError as error:
        raise unreadable(job_id, error) from error


def unreadable(job_id: int, error: UnreadableError) -> errors.UnavailableError:
    """Logs that a record cannot be decoded, and returns the error for the caller."""
    log.error("job_record_unreadable", job=job_id, error=str(error))
    return errors.UnavailableError(UNREADABLE)


async def found(jobs: JobStore, tenant: str, job_id: int) -> Stored:
    """Returns the record of one job. Raises JobNotFoundError, UnavailableError."""
    stored = await known(jobs, tenant, job_id)
    if stored is None:
        raise errors.JobNotFoundError(f"jobs/{job_id}")
    return stored


async def of_request(jobs: JobStore, tenant: str, request_id: str) -> list[Job]:
    """Returns the job that was created with the request_id, if it was accepted.

    Raises UnavailableError.
    """
    bound = await jobs.find_request(tenant, request_id)
    stored = await readable(jobs, tenant, bound[1]) if bound else None
    return [stored.job] if stored else []


async def page_of(
    jobs: JobStore, tenant: str, before: int, size: int, states: Container[State] | None = None
) -> tuple[list[Job], int]:
    """Returns up to `size` jobs of a tenant, newest first, and the `before` of the next page.

    Reads at most PAGE_READS records, so a page may have fewer jobs, or none, although others
    follow.

    Args:
        before: only jobs with lower ids.
        states: only jobs in these states; None: in any.

    Returns:
        The jobs, and the lowest id that was read, or 0 when there are no lower ones.

    Raises:
        UnavailableError.
    """
    listed: list[Job] = []
    for _ in range(max(1, PAGE_READS // size)):
        ids = await jobs.list_ids(tenant, before, size + 1)
        reading = [readable(jobs, tenant, job_id) for job_id in ids[:size]]
        for job_id, stored in zip(ids, await asyncio.gather(*reading), strict=False):
            before = job_id
            if stored is None or (states is not None and stored.job.state not in states):
                continue
            listed.append(stored.job)
            if len(listed) == size:
                return listed, before if before != ids[-1] else 0
        if len(ids) <= size:
            return listed, 0
    return listed, before


async def readable(jobs: JobStore, tenant: str, job_id: int) -> Stored | None:
    """Returns a record of a page, or None if no such job was accepted or its record cannot be
    decoded. Raises UnavailableError.
    """
    try:
        return _accepted(await jobs.get(tenant, job_id))
    except UnreadableError as error:
        log.warning("job_record_skipped", job=job_id, error=str(error))
        return None


def _accepted(stored: Stored | None) -> Stored | None:
    return stored if stored and stored.job.is_accepted else None
