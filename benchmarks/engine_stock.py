"""The stock pipeline of diffusers as a server: one request at a time, or in static batches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from benchmarks.engine_clock import Clock
from benchmarks.engine_load import Outcome, Request, Served
from img2img_server.engine.diffusers.schedules import make_scheduler
from img2img_server.imaging.base import Pixels

SCHEDULER = "euler"


def load_pipeline(source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns the pipeline of all systems, channels last, since the benchmark compares only their
    loops.
    """
    pipeline = AutoPipelineForImage2Image.from_pretrained(source, dtype=dtype, safety_checker=None)
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def photo(side: int) -> Pixels:
    """Returns an init image."""
    ramp = np.linspace(0, 255, side * side * 3)
    return ramp.reshape(side, side, 3).astype(np.uint8)


def kind(request: Request) -> tuple[Any, ...]:
    """Returns the values that must be equal within a batch of the pipeline."""
    return request.side, request.num_inference_steps, request.strength, request.guidance_scale


class Stock:
    """Calls the pipeline as in its documentation.

    Args:
        pipeline: an image-to-image pipeline of diffusers, on its device.
    """

    def __init__(self, pipeline: Any) -> None:
        pipeline.scheduler = make_scheduler(SCHEDULER, dict(pipeline.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline

    def run(self, group: Sequence[Request]) -> list[Any]:
        """Returns the images of requests of one kind, from one call."""
        first = group[0]
        answer = self._pipeline(
            prompt=[request.prompt for request in group],
            image=[Image.fromarray(photo(request.side)) for request in group],
            strength=first.strength,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in group],
        )
        return list(answer.images)


class StockServer:
    """The pipeline behind a queue, first in, first out.

    Args:
        most: largest number of requests of one kind in a call.
    """

    def __init__(self, pipeline: Any, clock: Clock, most: int) -> None:
        self._stock = Stock(pipeline)
        self._clock = clock
        self._most = most

    def serve(self, load: Sequence[Request]) -> Served:
        """Runs a load in real time."""
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        start, networks = time.perf_counter(), self._clock.seconds
        feeder = threading.Thread(target=feed, args=(load, start, waiting.put))
        feeder.start()
        backlog: list[Request] = []
        outcomes: list[Outcome] = []
        busy = 0.0
        while len(outcomes) < len(load):
            if not backlog:
                backlog.append(waiting.get())
            while not waiting.empty():
                backlog.append(waiting.get())
            group = [r for r in backlog if kind(r) == kind(backlog[0])][: self._most]
            backlog = [request for request in backlog if request not in group]
            began = time.perf_counter()
            self._stock.run(group)
            now = time.perf_counter()
            busy += now - began
            outcomes += [Outcome(request, now - start, now - start) for request in group]
        feeder.join()
        return Served(outcomes, busy, self._clock.seconds - networks)

    def stop(self) -> None:
        """Does nothing: the pipeline runs only during `serve`."""


def feed(load: Sequence[Request], start: float, put: Callable[[Request], object]) -> None:
    """Yields each request when it arrives. `start`: a time of perf_counter."""
    for request in load:
        time.sleep(max(0.0, start + request.arrival - time.perf_counter()))
        put(request)
