"""Job records for calls that go through many of them."""

from __future__ import annotations

import structlog

from img2img_server.store.base import JobStore, Stored, UnreadableError

log = structlog.get_logger()


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
