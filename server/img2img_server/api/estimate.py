"""Estimates how long jobs will take, and how much device time is queued.

Workers announce the time of one sample at 512x512 and the time of a pixel-step. NATS knows how many
jobs wait and up to which place they were taken. Each api knows only the costs of jobs that it
queued, and takes them as a sample of all jobs. See docs/adr/0008-what-workers-are-scaled-by.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

import structlog

from img2img_server.domain.job import Job, State
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.domain.schedulers import model_runs
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.queue import JobQueue, LaneLoad
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.telemetry import QUEUED_GPU_SECONDS, UNFINISHED_JOBS

log = structlog.get_logger()

REFRESH_SECONDS: Final = 5.0
REMEMBERED: Final = 1000  # number of jobs by model and lane whose cost is kept
# Used before a model has run: 14 steps of 512x512 in 3.7 s. Without this value workers could not be
# scaled up from zero, when nothing is measured.
UNMEASURED_PIXEL_STEP_SECONDS: Final = 1e-6
_BASE_PIXELS: Final = 512 * 512


class Estimator:
    """Estimates when jobs will end, from the live workers that have measured a job."""

    def __init__(self, queue: JobQueue, workers: WorkerRegistry) -> None:
        self._queue = queue
        self._workers = workers

    async def new_job(self, params: JobParams) -> tuple[int, float | None, float]:
        """Estimates a job that is queued now.

        Returns:
            The number of jobs before it, the seconds until it would end, if known, and the part of
            these seconds that it would wait for the jobs before it.
        """
        before = await self._queue.depth(params.model, params.lane)
        seconds = await self._seconds(params, before)
        own = await self._seconds(params, 0) if before else seconds
        return before, seconds, max(0.0, (seconds or 0.0) - (own or 0.0))

    async def device_seconds(self, params: JobParams, model: ModelInfo) -> float:
        """Returns the seconds that the device works on a job; 0.0 if no worker has measured its
        model.
        """
        measured = [
            worker.model.pixel_step_seconds
            for worker in await self._workers.workers()
            if worker.model.name == model.name and worker.model.pixel_step_seconds
        ]
        step_seconds = _mean(measured) or model.pixel_step_seconds
        return params.pixel_steps(model.strength_rule) * step_seconds

    async def place(self, params: JobParams, unfinished: int) -> float | None:
        """Returns the seconds until the first of a tenant's `unfinished` jobs ends, if known."""
        others = await self._queue.depth(params.model, params.lane) - unfinished
        return await self._seconds(params, max(0, others))

    async def job(self, job: Job) -> float | None:
        """Returns the seconds until a job ends. None if it has ended or no estimate is possible."""
        before = 0
        if job.state is State.QUEUED and job.queue_sequence:
            lane, place = job.params.lane, job.queue_sequence
            before = await self._queue.position(job.params.model, lane, place)
        elif job.state is not State.RUNNING:
            return None
        return await self._seconds(job.params, max(0, before))

    async def backlog(self, tenant: str = "") -> tuple[int, float]:
        """Returns the number of waiting jobs, and the seconds until they have ended.

        The seconds are those of the model that takes longest; 0.0 if no model was measured.

        Args:
            tenant: Counts only the unfinished jobs of this tenant, running ones included. Empty:
                counts all tenants' jobs that no worker has taken.
        """
        jobs, seconds = await self._queue.unfinished(tenant) if tenant else 0, 0.0
        for model in await self._workers.models():
            depth = jobs
            if not tenant:
                depth = sum([await self._queue.depth(model.name, lane) for lane in Lane])
                jobs += depth
            if serving := await self._serving(model.name):
                seconds = max(seconds, _mean_job_seconds(serving) * depth / len(serving))
        return jobs, seconds

    async def _serving(self, model: str) -> list[WorkerInfo]:
        return [
            worker
            for worker in await self._workers.workers()
            if worker.model.name == model and worker.job_seconds > 0
        ]

    async def _seconds(self, params: JobParams, before: int) -> float | None:
        serving = await self._serving(params.model)
        if not serving:
            return None
        mean = _mean_job_seconds(serving)
        own = mean * params.samples * params.width * params.height / _BASE_PIXELS
        return own + mean * before / len(serving)


class Backlog:
    """Estimates the device time of unfinished jobs, the metric by which workers are scaled."""

    def __init__(self, queue: JobQueue, workers: WorkerRegistry) -> None:
        self._queue = queue
        self._workers = workers
        self._costs: dict[tuple[str, Lane], deque[tuple[int, int]]] = {}

    def note(self, params: JobParams, place: int, pixel_steps: int) -> None:
        """Records the cost of a job that was queued at `place`."""
        key = (params.model, params.lane)
        self._costs.setdefault(key, deque(maxlen=REMEMBERED)).append((place, pixel_steps))

    async def measure(self) -> dict[tuple[str, Lane, str], float]:
        """Returns device seconds by model, lane and state, which is `waiting` or `taken`.

        Raises UnavailableError.
        """
        found = {}
        for model in await self._workers.models():
            step_seconds = await self._pixel_step_seconds(model)
            for lane in Lane:
                load = await self._queue.load(model.name, lane)
                UNFINISHED_JOBS.labels(model.name, lane.value).set(load.waiting + load.taken)
                for state, pixel_steps in self._work(model, lane, load):
                    found[model.name, lane, state] = pixel_steps * step_seconds
        return found

    def _work(self, model: ModelInfo, lane: Lane, load: LaneLoad) -> Iterator[tuple[str, float]]:
        costs = self._costs.get((model.name, lane), ())
        waiting = [cost for place, cost in costs if place > load.last_taken]
        taken = [cost for place, cost in costs if place <= load.last_taken]
        usual = _mean([cost for _, cost in costs]) or float(_default_cost(model))
        yield "waiting", load.waiting * (_mean(waiting) or usual)
        # The running jobs are the ones taken last, except where a later job has ended earlier.
        yield "taken", load.taken * (_mean(taken[-load.taken :]) or usual)

    async def _pixel_step_seconds(self, model: ModelInfo) -> float:
        """Returns the mean of the live workers, or else the value of the last worker."""
        measured = [
            worker.model.pixel_step_seconds
            for worker in await self._workers.workers()
            if worker.model.name == model.name and worker.model.pixel_step_seconds
        ]
        return _mean(measured) or model.pixel_step_seconds or UNMEASURED_PIXEL_STEP_SECONDS

    async def publish(self) -> None:
        """Keeps the metric up to date. Removes the metric while it cannot be measured."""
        while True:
            try:
                found = await self.measure()
            except Exception as error:  # A failed measurement must not end the api.
                QUEUED_GPU_SECONDS.clear()
                UNFINISHED_JOBS.clear()
                if not isinstance(error, UnavailableError):
                    log.error("queued_device_time_not_measured", exc_info=error)
            else:
                for labels, seconds in found.items():
                    QUEUED_GPU_SECONDS.labels(*labels).set(seconds)
            await asyncio.sleep(REFRESH_SECONDS)


def _default_cost(model: ModelInfo) -> int:
    """Returns the pixel-steps of a request that leaves everything to the model."""
    steps = model.strength_rule.denoising_steps(
        model.default_strength, model.default_num_inference_steps
    )
    return model.native_size**2 * model_runs(model.schedulers[0], max(1, steps))


def _mean_job_seconds(workers: Sequence[WorkerInfo]) -> float:
    return _mean([worker.job_seconds for worker in workers])


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
