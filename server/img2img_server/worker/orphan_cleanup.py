"""Deletes the files that unsuccessful jobs left in the service's own bucket.

See docs/http-contract.md#files: links of such jobs answer 404.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from img2img_server.domain.job import Job, State
from img2img_server.interfaces.records import JobStore
from img2img_server.storage.interface import BlobStore
from img2img_server.storage.watched_blobs import WatchedBlobs

# most queued jobs; the bucket's lifecycle rules delete the files of further jobs
MOST_WAITING = 1000

log = structlog.get_logger()


class OrphanCleanup:
    """Deletes the files of one job at a time, so that uploads keep their threads.

    It reads the record first: a job that another worker has taken or finished keeps its files.
    """

    def __init__(self, jobs: JobStore, blobs: BlobStore | WatchedBlobs) -> None:
        self._jobs = jobs
        self._blobs = blobs
        self._waiting: asyncio.Queue[Job] = asyncio.Queue(MOST_WAITING)

    def add(self, job: Job) -> None:
        """Adds a job whose run is over, however it ended. Returns at once."""
        if job.state is State.SUCCEEDED or not job.attempt:  # There is nothing to delete.
            return
        try:
            self._waiting.put_nowait(job)
        except asyncio.QueueFull:
            log.warning("orphan_files_kept_queue_full", job=job.id)

    async def run(self) -> None:
        """Deletes files until it is cancelled. No error of a job escapes."""
        while True:
            job = await self._waiting.get()
            try:
                await self._delete_files(job)
            except Exception as error:  # An error must not end the worker.
                log.warning("orphan_files_kept", job=job.id, why=str(error))
            finally:
                self._waiting.task_done()

    async def finish(self, seconds: float) -> None:
        """Returns when the files of all added jobs are deleted, or when the time has expired."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._waiting.join()

    async def _delete_files(self, job: Job) -> None:
        stored = await self._jobs.get(job.tenant, job.id)
        if stored is None or stored.job.state not in (State.FAILED, State.CANCELLED):
            return
        for index in range(stored.job.params.samples):
            await self._blobs.delete(stored.job.file_key(index))
