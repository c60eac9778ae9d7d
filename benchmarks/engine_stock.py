"""The stock pipeline of diffusers as a server: one request at a time, or in static batches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from benchmarks.engine_clock import Clock
from benchmarks.engine_load import UNET, Outcome, Request, Served
from img2img_server.domain.models import ModelKind
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.schedules import make_scheduler
from img2img_server.engine.family import ModelFiles
from img2img_server.imaging.base import Pixels


def load_pipeline(source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns the pipeline of all systems, channels last: the benchmark compares their loops."""
    # The tokenizer would report each truncated prompt.
    diffusers.utils.logging.set_verbosity_error()
    files = ModelFiles.read(Path(source))
    family = detect(files, source)
    options = {**dict.fromkeys(files.absent_parts), **family.load_options}
    pipeline_class = getattr(diffusers, family.pipelines[files.class_name])
    pipeline = pipeline_class.from_pretrained(source, dtype=dtype, **options)
    if family.kind is ModelKind.DIFFUSION:
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


Call = Callable[[Sequence[Request]], dict[str, Any]]


def call(group: Sequence[Request]) -> dict[str, Any]:
    """Returns the arguments of a pipeline for requests of one kind."""
    first = group[0]
    # The pipelines of UNets have no such arguments; those of transformers have another default.
    is_unet = first.traits == UNET
    return {
        **({} if is_unet else {"height": first.side, "width": first.side}),
        "prompt": [request.prompt for request in group],
        "image": [Image.fromarray(photo(request.side)) for request in group],
        "strength": first.strength,
        "num_inference_steps": first.num_inference_steps,
        "guidance_scale": first.guidance_scale,
    }


class Stock:
    """Calls the pipeline as in its documentation.

    Args:
        pipeline: An image-to-image pipeline of diffusers, on its device.
        arguments: Returns the pipeline's arguments for requests of one kind.
    """

    def __init__(self, pipeline: Any, arguments: Call = call) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline
        self._config = dict(pipeline.scheduler.config)
        self._call = arguments

    def run(self, group: Sequence[Request]) -> list[Any]:
        """Returns the images of requests of one kind, from one call."""
        self._pipeline.scheduler = make_scheduler(group[0].traits.scheduler, self._config)
        generators = [torch.Generator().manual_seed(request.seed) for request in group]
        answer = self._pipeline(**self._call(group), generator=generators)
        return list(answer.images)


class StockServer:
    """The pipeline behind a queue, first in, first out.

    Args:
        most: largest number of requests of one kind in a call.
    """

    def __init__(self, pipeline: Any, clock: Clock, most: int, arguments: Call = call) -> None:
        self._stock = Stock(pipeline, arguments)
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
