"""How much work is queued, in device seconds: the figure that workers are scaled by.

How many jobs wait, and up to which place they were taken, is one question to the bus. What they
cost is known of those that came in through this api; they stand for those that came in through
others. See docs/adr/0008-what-workers-are-scaled-by.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Final

import structlog

from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.queue import JobQueue, LaneLoad
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.telemetry import QUEUED_GPU_SECONDS

log = structlog.get_logger()

REFRESH_SECONDS: Final = 5.0
REMEMBERED: Final = 1000  # jobs by model and lane whose cost is kept
# Of a model of which nothing ever ran: 14 steps of 512x512 in 3.7 s. Workers must be scaled up from
# none before anything can be measured.
UNMEASURED_PIXEL_STEP_SECONDS: Final = 1e-6


class Backlog:
    """Estimates the device time of unfinished jobs. One for the life of the api."""

    def __init__(self, queue: JobQueue, workers: WorkerRegistry) -> None:
        self._queue = queue
        self._workers = workers
        self._costs: dict[tuple[str, Lane], deque[tuple[int, int]]] = {}

    def note(self, params: JobParams, place: int, pixel_steps: int) -> None:
        """Remembers what a job costs that was queued at `place`."""
        key = (params.model, params.lane)
        costs = self._costs.setdefault(key, deque(maxlen=REMEMBERED))
        costs.append((place, pixel_steps))

    async def measure(self) -> dict[tuple[str, Lane, str], float]:
        """Device seconds by model, lane and state: `waiting` or `taken`.

        Raises:
            UnavailableError: the bus is down.
        """
        found = {}
        for model in await self._workers.models():
            pace = await self._pace(model)
            for lane in Lane:
                load = await self._queue.load(model.name, lane)
                for state, pixel_steps in self._work(model, lane, load):
                    found[model.name, lane, state] = pixel_steps * pace
        return found

    def _work(self, model: ModelInfo, lane: Lane, load: LaneLoad) -> Iterator[tuple[str, float]]:
        costs = self._costs.get((model.name, lane), ())
        waiting = [cost for place, cost in costs if place > load.last_taken]
        taken = [cost for place, cost in costs if place <= load.last_taken]
        usual = _mean([cost for _, cost in costs]) or float(_default_cost(model))
        yield "waiting", load.waiting * (_mean(waiting) or usual)
        # Taken jobs are the latest of those, give or take the ones that a neighbour overtook.
        yield "taken", load.taken * (_mean(taken[-load.taken :]) or usual)

    async def _pace(self, model: ModelInfo) -> float:
        """Seconds a pixel-step: the mean of the live workers, else what the last ones measured."""
        measured = [
            worker.model.pixel_step_seconds
            for worker in await self._workers.workers()
            if worker.model.name == model.name and worker.model.pixel_step_seconds
        ]
        return _mean(measured) or model.pixel_step_seconds or UNMEASURED_PIXEL_STEP_SECONDS

    async def publish(self) -> None:
        """Keeps the metric up to date; while the bus is away there is none, not an old one."""
        while True:
            try:
                found = await self.measure()
            except UnavailableError:
                QUEUED_GPU_SECONDS.clear()
            except Exception as error:  # a figure less must not end the api
                log.error("queued device time cannot be measured", exc_info=error)
                QUEUED_GPU_SECONDS.clear()
            else:
                for labels, seconds in found.items():
                    QUEUED_GPU_SECONDS.labels(*labels).set(seconds)
            await asyncio.sleep(REFRESH_SECONDS)


def _default_cost(model: ModelInfo) -> int:
    """Pixel-steps of a request that leaves everything to the model."""
    steps = model.strength_rule.denoising_steps(
        model.default_strength, model.default_num_inference_steps
    )
    return model.native_size**2 * max(1, steps)


def _mean(numbers: list[int] | list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
