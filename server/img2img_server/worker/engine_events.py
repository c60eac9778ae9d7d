"""A job in the engine's hands: what it is given and what it tells."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from img2img_server.domain.events import Preview, StageFinished, StepFinished
from img2img_server.domain.job import Job
from img2img_server.domain.models import ModelInfo
from img2img_server.engine.base import (
    EngineEvent,
    EngineJob,
    Pixels,
    PreviewReady,
    StageDone,
    StepDone,
)
from img2img_server.imaging.encode import preview_jpeg
from img2img_server.worker.spans import DeviceSpans


class EngineEventStream:
    """Engine events of one job, from the device's thread to this loop. Made when it begins."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, EngineEvent]] = asyncio.Queue()
        self._spans = DeviceSpans()

    def post(self, event: EngineEvent) -> None:
        """For the engine, on any thread."""
        with suppress(RuntimeError):  # the loop is gone: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (time.time_ns(), event))

    async def get(self) -> EngineEvent:
        """The next event."""
        told_at, event = await self._events.get()
        self._spans.note(told_at, event)
        return event

    def close(self) -> None:
        """Nobody listens any more."""
        self._spans.close()


def engine_job(job: Job, pixels: Pixels, model: ModelInfo) -> EngineJob:
    """The job for the engine; what the request left open is the model's."""
    params = job.params
    guidance = params.guidance_scale
    return EngineJob(
        job_id=job.id,
        tenant=job.tenant,
        lane=params.lane,
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        init_image=pixels,
        strength=params.strength,
        seeds=tuple(params.sample_seed(index) for index in range(params.samples)),
        num_inference_steps=params.num_inference_steps or model.default_num_inference_steps,
        guidance_scale=model.default_guidance_scale if guidance is None else guidance,
        scheduler=params.scheduler or model.schedulers[0],
        preview_interval_steps=params.preview_interval_steps,
        enqueue_time=time.monotonic(),
        lora=params.lora,
        lora_scale=params.lora_scale,
        deadline=_monotonic(job.deadline_time),
    )


async def to_domain_event(
    event: StageDone | StepDone | PreviewReady,
) -> StageFinished | StepFinished | Preview:
    """An engine event as callers see it."""
    match event:
        case StageDone():
            return StageFinished(stage=event.stage)
        case StepDone():
            return StepFinished(
                sample=event.sample, step=event.step, total=event.total, sigma=event.sigma
            )
        case PreviewReady():
            image = await asyncio.to_thread(preview_jpeg, event.pixels)
            return Preview(sample=event.sample, step=event.step, image=image)


def _monotonic(unix_seconds: float) -> float | None:
    """The moment on this machine's own clock; None: never."""
    return time.monotonic() + unix_seconds - time.time() if unix_seconds else None
