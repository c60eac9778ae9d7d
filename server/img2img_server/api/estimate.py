"""Estimates how long jobs will take, and how much device time is queued.

Workers announce the times of a forward and of a pixel-step. NATS knows how many jobs of which size
class and tenant wait, and up to which place they were taken. Each api knows only the costs of jobs
that it queued, and takes them as a sample of all jobs.
See docs/adr/0008-what-workers-are-scaled-by.md.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from img2img_server import clock
from img2img_server.domain.job import Job, State
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.domain.schedulers import model_runs
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.queue import SIZE_STEP, JobQueue, LaneLoad, size_of
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.telemetry import QUEUED_GPU_SECONDS, UNFINISHED_JOBS, WORKERS

log = structlog.get_logger()

REFRESH_SECONDS: Final = 5.0
REMEMBERED: Final = 1000  # number of jobs by model and lane whose cost is kept
# Used before a model has run: 14 steps of 512x512 in 3.7 s. Without this value workers could not be
# scaled up from zero, when nothing is measured.
UNMEASURED_PIXEL_STEP_SECONDS: Final = 1e-6
_BASE_PIXELS: Final = 512 * 512
_LEFT_SHARE: Final = 0.5  # of a job that runs, this share is left on average
_LEAST_SHARE: Final = 0.05  # of its own time, a job that has run longer than estimated still needs
_SIZE_WEIGHT: Final = 0.1  # of a new job in the mean work of its size class
_ALL_OF_REALTIME: Final = "/"  # no tenant has this name


@dataclass(frozen=True, slots=True)
class _Ahead:
    """The jobs that are served before a job.

    Attributes:
        jobs: The waiting ones.
        work: Their forwards at the model's native size.
        running: The forwards that are left of jobs that workers have.
        goes_between: The job may run between the steps of those jobs, because its tenant has none.
    """

    jobs: int = 0
    work: float = 0.0
    running: float = 0.0
    goes_between: bool = False


class Estimator:
    """Estimates when jobs will end, from the live workers that have measured a job.

    It follows the order in which workers pull (worker/dispatch.py): realtime first, tenants in
    turn, shorter jobs of a tenant first. The work of other jobs is known by their size class only.
    """

    def __init__(self, queue: JobQueue, workers: WorkerRegistry) -> None:
        self._queue = queue
        self._workers = workers
        self._sizes: dict[tuple[str, int], float] = {}  # mean work by model and size class

    async def new_job(
        self, params: JobParams, tenant: str, model: ModelInfo
    ) -> tuple[int, float | None, float]:
        """Estimates a job that is queued now.

        Returns:
            The number of jobs before it, the seconds until it would end, if known, and the part of
            these seconds that it would wait for the jobs before it.
        """
        work = model.work(params)
        size = size_of(work)
        known = self._sizes.get((model.name, size), work)
        self._sizes[model.name, size] = known + _SIZE_WEIGHT * (work - known)
        ahead = await self._ahead(model, params.lane, size, tenant)
        seconds, wait = await self._seconds(params, work, ahead)
        return ahead.jobs, seconds, wait

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
        return model.pixel_steps(params) * step_seconds

    async def place(self, params: JobParams, tenant: str, model: ModelInfo) -> float | None:
        """Returns the seconds until the first of a tenant's unfinished jobs ends, if known."""
        loads = await self._queue.loads(model.name)
        mine = [load for load in loads if load.source.jobs.get(tenant)]
        ahead = _Ahead()
        if not any(load.taken for load in mine):
            ahead = await self._ahead(model, params.lane, 0, tenant)
        sizes = [load.source.size for load in mine] or [size_of(model.work(params))]
        return (await self._seconds(params, self._typical(model, min(sizes)), ahead))[0]

    async def job(self, job: Job) -> float | None:
        """Returns the seconds until a job ends. None if it has ended or no estimate is possible."""
        params = job.params
        model = await self._workers.model(params.model)
        if model is None or job.state.is_terminal:
            return None
        work = model.work(params)
        if job.state is State.RUNNING:
            seconds, _ = await self._seconds(params, work, _Ahead())
            ran = max(0.0, clock.now() - job.start_time)
            return None if seconds is None else max(seconds - ran, _LEAST_SHARE * seconds)
        if not job.queue_sequence:
            return None
        ahead = await self._ahead(model, params.lane, size_of(work), job.tenant, job.queue_sequence)
        return (await self._seconds(params, work, ahead))[0]

    async def backlog(self, tenant: str = "") -> tuple[int, float]:
        """Returns the number of waiting jobs, and the seconds until they have ended.

        The seconds are those of the model that takes longest; 0.0 if no model was measured.

        Args:
            tenant: Counts only the unfinished jobs of this tenant, running ones included. Empty:
                counts all tenants' jobs that no worker has begun.
        """
        jobs, seconds = 0, 0.0
        workers = [] if tenant else await self._workers.workers()
        for model in await self._workers.models():
            serving = await self._serving(model.name)
            loads = await self._queue.loads(model.name)
            number = sum(each.held_jobs for each in workers if each.model.name == model.name)
            taken = [load.source.size for load in loads if load.taken]
            work = number * _mean([self._typical(model, size) for size in taken])
            for load in loads:
                count = load.source.jobs.get(tenant, 0) if tenant else load.waiting
                number += count
                work += count * self._typical(model, load.source.size)
            jobs += number
            if serving:
                rate = _mean([worker.forward_seconds for worker in serving])
                spent = work * rate if rate else number * _mean_job_seconds(serving)
                seconds = max(seconds, spent / len(serving))
        return jobs, seconds

    def _typical(self, model: ModelInfo, size: int) -> float:
        """Returns the mean work of jobs of a size class."""
        return self._sizes.get((model.name, size)) or 2.0 * SIZE_STEP**size

    async def _ahead(
        self, model: ModelInfo, lane: Lane, size: int, tenant: str, place: int = 0
    ) -> _Ahead:
        """Returns the jobs served before a job. `place`: its place in the queue; 0: it is new."""
        loads = await self._queue.loads(model.name)
        own: Counter[int] = Counter()  # number of waiting jobs by size class
        others: dict[str, Counter[int]] = {}
        for load in loads:
            source = load.source
            if lane is Lane.BATCH and source.lane is Lane.REALTIME:
                others.setdefault(_ALL_OF_REALTIME, Counter())[source.size] += load.waiting
            for each in source.jobs if source.lane is lane else ():
                number = load.waiting_of(each)
                if each != tenant:
                    others.setdefault(each, Counter())[source.size] += number
                elif source.size < size:
                    own[source.size] += number
                elif source.size == size:
                    before = min(place - load.last_taken - 1, number - 1) if place else number
                    own[source.size] += max(0, before)
        turns = own.total()
        jobs, work = turns, self._work(model, own)
        for name, numbers in others.items():
            # Another tenant has as many turns as this one before the job.
            share = min(1.0, turns / max(1, numbers.total()))
            share = 1.0 if name == _ALL_OF_REALTIME else share
            jobs += round(share * numbers.total())
            work += share * self._work(model, numbers)
        taken: Counter[int] = Counter()
        for load in loads:
            taken[load.source.size] += load.taken
        mine = any(load.taken and tenant in load.source.jobs for load in loads)
        running = self._work(model, taken) * _LEFT_SHARE
        return _Ahead(jobs, work, running, goes_between=not mine and not turns)

    def _work(self, model: ModelInfo, numbers: Mapping[int, int]) -> float:
        return sum(number * self._typical(model, size) for size, number in numbers.items())

    async def _serving(self, model: str) -> list[WorkerInfo]:
        """Returns the measured workers that have loaded the model, or else those that can load
        it.
        """
        measured = [
            worker
            for worker in await self._workers.workers()
            if worker.model.name == model and worker.job_seconds > 0
        ]
        return [worker for worker in measured if worker.is_loaded] or measured

    async def _seconds(
        self, params: JobParams, work: float, ahead: _Ahead
    ) -> tuple[float | None, float]:
        """Returns the seconds until a job with this work ends, and the part that it waits."""
        serving = await self._serving(params.model)
        if not serving:
            return None, 0.0
        loading = min(0.0 if each.is_loaded else each.load_seconds for each in serving)
        rate = _mean([worker.forward_seconds for worker in serving])
        latency = _mean([worker.job_forward_seconds for worker in serving])
        if not rate or not latency:  # workers of an earlier version, or before the first jobs
            mean = _mean_job_seconds(serving)
            own = mean * params.samples * params.width * params.height / _BASE_PIXELS
            wait = loading + mean * ahead.jobs / len(serving)
            return own + wait, wait
        own = latency * work
        left = ahead.running * rate / len(serving)
        wait = loading + ahead.work * rate / len(serving)
        wait += min(left, own) if ahead.goes_between else left
        return own + wait, wait


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
        serving = Counter(each.model.name for each in await self._workers.workers())
        for model in await self._workers.models():
            WORKERS.labels(model.name).set(serving[model.name])
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
                WORKERS.clear()
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
