"""How long a job will take: its own work and what lies before it, shared by the live workers."""

from __future__ import annotations

from collections.abc import Sequence

from img2img_server.domain.job import Job, State
from img2img_server.domain.models import WorkerInfo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.interfaces.queue import JobQueue
from img2img_server.interfaces.records import WorkerRegistry

_BASE_PIXELS = 512 * 512


class Estimator:
    """Estimates from the workers' announced time of one sample at 512x512."""

    def __init__(self, queue: JobQueue, workers: WorkerRegistry) -> None:
        self._queue = queue
        self._workers = workers

    async def new_job(self, params: JobParams) -> tuple[int, float | None, float]:
        """Jobs before one that comes now, seconds until it would end, if known, and how many of
        them it would wait for those jobs."""
        before = await self._queue.depth(params.model, params.lane)
        seconds = await self._seconds(params, before)
        own = await self._seconds(params, 0) if before else seconds
        return before, seconds, max(0.0, (seconds or 0.0) - (own or 0.0))

    async def place(self, params: JobParams, unfinished: int) -> float | None:
        """Seconds until the first of a tenant's `unfinished` jobs has ended, if known."""
        others = await self._queue.depth(params.model, params.lane) - unfinished
        return await self._seconds(params, max(0, others))

    async def job(self, job: Job) -> tuple[int, float | None]:
        """Jobs before it (-1: unknown, 0 when running) and seconds until it ends, if known."""
        if job.state is State.RUNNING:
            return 0, await self._seconds(job.params, 0)
        if job.state is not State.QUEUED or not job.queue_sequence:
            return -1, None
        before = await self._queue.position(job.params.model, job.params.lane, job.queue_sequence)
        return before, await self._seconds(job.params, max(0, before))

    async def backlog(self, tenant: str = "") -> tuple[int, float]:
        """Returns how many jobs wait, and the seconds until they have ended.

        The seconds are those of the model that takes longest; 0.0 if no model was measured.

        Args:
            tenant: counts only the unfinished jobs of this tenant, running ones included. Empty:
                counts the jobs of all tenants that no worker has taken.
        """
        jobs, seconds = await self._queue.unfinished(tenant) if tenant else 0, 0.0
        for model in await self._workers.models():
            depth = jobs
            if not tenant:
                depth = sum([await self._queue.depth(model.name, lane) for lane in Lane])
                jobs += depth
            if serving := await self._serving(model.name):
                seconds = max(seconds, _mean_seconds(serving) * depth / len(serving))
        return jobs, seconds

    async def _serving(self, model: str) -> list[WorkerInfo]:
        """Live workers of the model that know how fast they are."""
        return [
            worker
            for worker in await self._workers.workers()
            if worker.model.name == model and worker.job_seconds > 0
        ]

    async def _seconds(self, params: JobParams, before: int) -> float | None:
        serving = await self._serving(params.model)
        if not serving:
            return None
        mean = _mean_seconds(serving)
        own = mean * params.samples * params.width * params.height / _BASE_PIXELS
        return own + mean * before / len(serving)


def _mean_seconds(workers: Sequence[WorkerInfo]) -> float:
    return sum(worker.job_seconds for worker in workers) / len(workers)
