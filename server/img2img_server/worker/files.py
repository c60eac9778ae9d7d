"""Where a job's files go: into the tenant's own storage, or into the service's bucket."""

from __future__ import annotations

import structlog

from img2img_server.domain.job import Job
from img2img_server.errors import StorageError
from img2img_server.storage.vault import SealBrokenError
from img2img_server.worker.deps import WorkerDeps

log = structlog.get_logger()


async def store_file(parts: WorkerDeps, job: Job, index: int, data: bytes, media_type: str) -> str:
    """Stores one sample's file and returns its link.

    A tenant's storage that does not take it is no failure of the job: the file goes into our own
    bucket then, and `storage_warning` says so.

    Raises:
        StorageError: our own bucket refused it, also after retries.
        UnavailableError: the bus is down.
    """
    key = job.file_key(index)
    if job.storage_version:
        try:
            details = await parts.storage.get(job.tenant, job.storage_version)
            if details is None:
                raise StorageError("the storage details are gone")
            await parts.tenant_s3.put(details, key.rpartition("/")[2], data, media_type)
            return job.future_urls[index]
        except (StorageError, SealBrokenError) as error:
            log.warning("file kept in our own bucket", why=str(error), tenant=job.tenant)
    await parts.blobs.put(key, data, media_type)
    return job.own_urls[index] if job.own_urls else job.future_urls[index]


def storage_warning(job: Job, retention_hours: int) -> str:
    """What to tell about files that are not where they were announced; mostly nothing."""
    if all(sample.url == job.future_urls[sample.index] for sample in job.samples):
        return ""
    return (
        "Your S3 storage did not take the files; this service keeps them for "
        f"{retention_hours} hours."
    )
