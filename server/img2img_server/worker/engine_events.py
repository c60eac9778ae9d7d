"""A job in the engine: the EngineJob that the engine gets, and the events that it emits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields

from opentelemetry.trace import Span

from img2img_server import clock
from img2img_server.domain.events import Stage, StageFinished, StepFinished
from img2img_server.domain.job import Job
from img2img_server.domain.stages import Span as StageSpan
from img2img_server.engine.base import EngineEvent, EngineJob, JobPlan, JobState, SampleReady
from img2img_server.imaging.base import Pixels
from img2img_server.tracing import TRACER

PAUSE_SPAN_SECONDS = 0.05  # shorter pauses between two steps have no span


class EngineEventStream:
    """The engine's events of one job, passed from the engine's threads to the event loop.

    It also makes the spans of the device: "encode", which includes the wait for a step boundary,
    then for each sample "denoise", with an event for each step, and "decode".
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, float, EngineEvent]] = asyncio.Queue()
        self.posted = time.monotonic()  # when the engine posted the event that `get` returned last
        self._submitted = self._encoded = time.time_ns()
        self._denoising: dict[int, Span] = {}
        self._denoised: dict[int, int] = {}

    def post(self, event: EngineEvent) -> None:
        """Adds an event, on any thread."""
        with suppress(RuntimeError):  # The event loop has ended.
            stamped = time.time_ns(), time.monotonic(), event
            self._loop.call_soon_threadsafe(self._events.put_nowait, stamped)

    async def get(self) -> EngineEvent:
        """Waits for the next event."""
        at, self.posted, event = await self._events.get()
        self._trace(at, event)
        return event

    def close(self) -> None:
        """Ends the spans that a cancel or an error left open."""
        for span in self._denoising.values():
            span.end()

    def _trace(self, at: int, event: EngineEvent) -> None:
        match event:
            case StageFinished(stage=Stage.IMAGE_ENCODED):
                TRACER.start_span("encode", start_time=self._submitted).end(at)
                self._encoded = at
            case StepFinished():
                self._trace_step(at, event)
            case SampleReady(sample=sample) if sample in self._denoised:
                span = TRACER.start_span("decode", start_time=self._denoised.pop(sample))
                span.set_attribute("img2img.sample", sample)
                span.end(at)

    def _trace_step(self, at: int, event: StepFinished) -> None:
        span = self._denoising.get(event.sample)
        if span is None:
            span = TRACER.start_span("denoise", start_time=self._encoded)
            span.set_attribute("img2img.sample", event.sample)
            self._denoising[event.sample] = span
        numbers = {"step": event.step, "total": event.total, "sigma": event.sigma}
        span.add_event("step", numbers, timestamp=at)
        if event.step == event.total:
            self._denoising.pop(event.sample).end(at)
            self._denoised[event.sample] = at


def job_plan(job: Job) -> JobPlan:
    """Returns the plan of a job, with its deadline on this machine's monotonic clock."""
    deadline = None
    if job.deadline_time:
        deadline = time.monotonic() + job.deadline_time - clock.now()
    return JobPlan(
        job_id=job.id,
        tenant=job.tenant,
        params=job.params,
        enqueue_time=time.monotonic(),
        deadline=deadline,
        stored=frozenset(sample.index for sample in job.samples if sample.url),
    )


def engine_job(plan: JobPlan, init_image: Pixels, state: JobState | None = None) -> EngineJob:
    """Returns the EngineJob of a planned job, which continues from `state`."""
    values = {each.name: getattr(plan, each.name) for each in fields(plan)}
    return EngineJob(**values, init_image=init_image, state=state)


def trace_waits(job: Job, pulled: float, spans: Sequence[StageSpan]) -> None:
    """Makes spans of the times in which a job that has ended waited.

    Args:
        pulled: Monotonic seconds when the worker pulled the job.
        spans: The spans of the engine.
    """
    now, wall = time.monotonic(), time.time_ns()

    def at(moment: float) -> int:
        return wall - int((now - moment) * 1e9)

    began = min((span.began for span in spans), default=pulled)
    queued = at(pulled) - int(job.timings.queue * 1e9)
    TRACER.start_span("queue", start_time=queued).end(at(pulled))
    TRACER.start_span("held", start_time=at(pulled)).end(at(began))
    for span in spans:
        if span.stage == "paused" and span.ended - span.began >= PAUSE_SPAN_SECONDS:
            TRACER.start_span("paused", start_time=at(span.began)).end(at(span.ended))
