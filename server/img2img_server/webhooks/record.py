"""What the job's record and the outbox are told of a webhook."""

from __future__ import annotations

from dataclasses import replace

import structlog

from img2img_server.domain.job import Job
from img2img_server.interfaces.records import ConflictError, JobStore
from img2img_server.interfaces.webhooks import OutboxFullError, WebhookOutbox

RETRYING, SUCCESS, FAILED = "retrying", "success", "failed"  # Job.webhook_status

log = structlog.get_logger()


async def announce(outbox: WebhookOutbox, jobs: JobStore, job: Job) -> None:
    """Puts the webhook of a job that has ended into the outbox, if it asked for one.

    To be called after the record says that the job has ended and before its log does: whoever dies
    between is followed by one who calls again, and the outbox keeps one of both.
    A full outbox gives up the webhook, never the job. Raises UnavailableError.
    """
    if not job.params.webhook:
        return
    try:
        await outbox.put(job)
    except OutboxFullError:
        log.warning("webhook given up, the tenant has too many waiting", job=job.id)
        await set_status(jobs, job, FAILED, "too many webhooks of the tenant are waiting")


async def set_status(jobs: JobStore, job: Job, status: str, error: str = "") -> None:
    """Writes webhook_status and webhook_error and nothing else; fine when the record is gone.

    Raises:
        UnavailableError: the bus is down.
    """
    while True:
        stored = await jobs.get(job.tenant, job.id)
        if stored is None:
            return
        changed = replace(stored.job, webhook_status=status, webhook_error=error)
        if changed == stored.job:
            return
        try:
            await jobs.update(changed, stored.revision)
        except ConflictError:
            continue  # somebody else wrote: look again
        return
