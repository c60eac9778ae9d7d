"""Deletes what jobs without success have left in the service's own bucket (contract, section 7)."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from img2img_server.domain.job import Job, State
from img2img_server.interfaces.records import JobStore
from img2img_server.storage.interface import BlobStore

MOST_WAITING = 1000  # jobs; beyond them files stay until the bucket's lifecycle rules take them

log = structlog.get_logger()


class OrphanCleanup:
    """One for the life of the worker. One job at a time, so that uploads keep their threads.

    Only the record decides: what another worker has, or has brought to a good end, keeps its files.
    """

    def __init__(self, jobs: JobStore, blobs: BlobStore) -> None:
        self._jobs = jobs
        self._blobs = blobs
        self._waiting: asyncio.Queue[Job] = asyncio.Queue(MOST_WAITING)

    def add(self, job: Job) -> None:
        """Notes a job whose run is over, however it ended. Returns at once."""
        if job.state is State.SUCCEEDED or not job.attempt:  # nothing to delete
            return
        try:
            self._waiting.put_nowait(job)
        except asyncio.QueueFull:
            log.warning("files of a job that failed are kept, too many wait", job=job.id)

    async def run(self) -> None:
        """Deletes until it is cancelled. Never raises for a job's sake."""
        while True:
            job = await self._waiting.get()
            try:
                await self._sweep(job)
            except Exception as error:  # its worker has better things to do than to end
                log.warning("files of a job that failed are kept", job=job.id, why=str(error))
            finally:
                self._waiting.task_done()

    async def finish(self, seconds: float) -> None:
        """Returns when all that was noted is deleted, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._waiting.join()

    async def _sweep(self, job: Job) -> None:
        stored = await self._jobs.get(job.tenant, job.id)
        if stored is None or stored.job.state not in (State.FAILED, State.CANCELLED):
            return
        for index in range(stored.job.params.samples):
            await self._blobs.delete(stored.job.file_key(index))
