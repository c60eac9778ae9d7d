"""Puts webhooks of ended jobs into the outbox and writes their status into the job's record."""

from __future__ import annotations

from dataclasses import replace

import structlog

from img2img_server.domain.job import Job
from img2img_server.interfaces.records import ConflictError, JobStore
from img2img_server.interfaces.webhooks import OutboxFullError, WebhookOutbox

RETRYING, SUCCESS, FAILED = "retrying", "success", "failed"  # the values of Job.webhook_status

log = structlog.get_logger()


async def announce(outbox: WebhookOutbox, jobs: JobStore, job: Job) -> None:
    """Puts the webhook of an ended job into the outbox, if the job has one.

    Call it after the end is in the job's record and before the terminal event is in its log. If the
    process dies in between, the next owner of the job calls it again, and the outbox drops the
    duplicate. If the outbox is full, the webhook is given up; the job still ends normally. Raises
    UnavailableError.
    """
    if not job.params.webhook:
        return
    try:
        await outbox.put(job)
    except OutboxFullError:
        log.warning("webhook_given_up_outbox_full", job=job.id, tenant=job.tenant)
        await set_status(jobs, job, FAILED, "too many webhooks of the tenant are waiting")


async def set_status(
    jobs: JobStore, job: Job, status: str, error: str = "", attempts: int = 0
) -> None:
    """Writes the webhook's status, error and attempts into the job's record, if there is one.

    Raises:
        UnavailableError: NATS is not available.
    """
    while True:
        stored = await jobs.get(job.tenant, job.id)
        if stored is None:
            return
        changed = replace(
            stored.job, webhook_status=status, webhook_error=error, webhook_attempts=attempts
        )
        if changed == stored.job:
            return
        try:
            await jobs.update(changed, stored.revision)
        except ConflictError:
            continue  # The record has changed meanwhile, so it is read again.
        return
