"""What the engine benchmark compares: the stock pipeline, one at a time and batched, and ours."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from benchmarks.engine_load import Outcome, Request
from img2img_server.domain.params import Lane
from img2img_server.engine.base import (
    EngineEvent,
    EngineJob,
    JobDone,
    JobError,
    Pixels,
    PreviewReady,
)
from img2img_server.engine.diffusers_denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers_schedules import make_scheduler
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.model_spec import ModelSpec

_SCHEDULER = "euler"


def load_pipeline(source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline that all systems run. Channels last for all: the comparison is of the loops."""
    pipeline = AutoPipelineForImage2Image.from_pretrained(source, dtype=dtype, safety_checker=None)
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def photo(side: int) -> Pixels:
    """A picture that costs as much as any other."""
    ramp = np.linspace(0, 255, side * side * 3)
    return ramp.reshape(side, side, 3).astype(np.uint8)


class StockServer:
    """The pipeline of diffusers behind a queue, first come first served.

    Args:
        pipeline: an image-to-image pipeline of diffusers, on its device.
        most: requests it runs in one call. The pipeline takes together only what has the same
            size, step count, strength and guidance scale.
    """

    def __init__(self, pipeline: Any, most: int) -> None:
        pipeline.scheduler = make_scheduler(_SCHEDULER, dict(pipeline.scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline
        self._most = most

    def serve(self, load: Sequence[Request]) -> tuple[list[Outcome], float]:
        """Runs a load in real time; the outcomes, and the seconds the pipeline ran."""
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        start = time.perf_counter()
        feeder = threading.Thread(target=_feed, args=(load, start, waiting.put))
        feeder.start()
        backlog: list[Request] = []
        outcomes: list[Outcome] = []
        busy = 0.0
        while len(outcomes) < len(load):
            if not backlog:
                backlog.append(waiting.get())
            while not waiting.empty():
                backlog.append(waiting.get())
            group = [r for r in backlog if _kind(r) == _kind(backlog[0])][: self._most]
            backlog = [request for request in backlog if request not in group]
            began = time.perf_counter()
            self._run(group)
            now = time.perf_counter()
            busy += now - began
            outcomes += [Outcome(request, now - start, now - start) for request in group]
        feeder.join()
        return outcomes, busy

    def _run(self, group: Sequence[Request]) -> None:
        first = group[0]
        self._pipeline(
            prompt=[request.prompt for request in group],
            image=[Image.fromarray(photo(request.side)) for request in group],
            strength=first.strength,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in group],
        )


class EngineServer:
    """Ours."""

    def __init__(self, pipeline: Any, capacity_rows: int) -> None:
        self._denoiser = TimedDenoiser(pipeline)
        self._engine = DiffusionEngine(
            self._denoiser, ModelSpec(source="", name="bench"), capacity_rows
        )

    def serve(self, load: Sequence[Request]) -> tuple[list[Outcome], float]:
        """Runs a load in real time; the outcomes, and the seconds the model ran."""
        self._denoiser.seconds = 0.0
        done: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
        start = time.perf_counter()

        def submit(request: Request) -> None:
            looks: list[float] = []

            def sink(event: EngineEvent) -> None:
                now = time.perf_counter() - start
                match event:
                    case PreviewReady():
                        looks.append(now)
                    case JobDone():
                        done.put(Outcome(request, looks[0] if looks else now, now))
                    case JobError(error):
                        done.put(error)

            self._engine.submit(_job(request), sink)

        feeder = threading.Thread(target=_feed, args=(load, start, submit))
        feeder.start()
        outcomes = []
        for _ in load:
            outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            outcomes.append(outcome)
        feeder.join()
        return outcomes, self._denoiser.seconds

    def stop(self) -> None:
        self._engine.stop()


class TimedDenoiser(DiffusersDenoiser):
    """Adds up the seconds the model runs. On a GPU a step's time shows in the next wait for it."""

    seconds = 0.0

    def encode_texts(self, *arguments: Any) -> Any:
        return self._timed(super().encode_texts, *arguments)

    def encode_images(self, *arguments: Any) -> Any:
        return self._timed(super().encode_images, *arguments)

    def denoise(self, *arguments: Any) -> Any:
        return self._timed(super().denoise, *arguments)

    def decode(self, *arguments: Any) -> Any:
        return self._timed(super().decode, *arguments)

    def _timed(self, work: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        self.seconds += time.perf_counter() - began
        return result


def _job(request: Request) -> EngineJob:
    return EngineJob(
        job_id=request.number,
        tenant="bench",
        lane=Lane.REALTIME,
        prompt=request.prompt,
        negative_prompt="",
        init_image=photo(request.side),
        strength=request.strength,
        seeds=(request.seed,),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=_SCHEDULER,
        preview_interval_steps=1,
    )


def _kind(request: Request) -> tuple[Any, ...]:
    """What the pipeline needs to be equal in a batch."""
    return request.side, request.num_inference_steps, request.strength, request.guidance_scale


def _feed(load: Sequence[Request], start: float, put: Any) -> None:
    for request in load:
        time.sleep(max(0.0, start + request.arrival - time.perf_counter()))
        put(request)
