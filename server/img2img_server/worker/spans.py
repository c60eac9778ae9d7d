"""The trace of a job on its worker: one span for the run, one for each stage on the device."""

from __future__ import annotations

import time

from opentelemetry.trace import Span, SpanKind

from img2img_server.domain.events import Stage
from img2img_server.engine.base import EngineEvent, SampleReady, StageDone, StepDone
from img2img_server.interfaces.queue import Delivery
from img2img_server.tracing import TRACER, enter, extracted


def enter_run(delivery: Delivery, model: str) -> Span:
    """The span of a whole run, current from now on in this task and in what it starts."""
    job = delivery.job
    attributes = {
        "img2img.job": f"jobs/{job.job_id}",
        "img2img.tenant": job.tenant,
        "img2img.model": model,
        "img2img.attempt": delivery.attempt,
    }
    return enter("run job", extracted(job.trace.items()), SpanKind.CONSUMER, attributes)


class DeviceSpans:
    """Makes spans of engine events: encode (waiting for a step boundary included), then for each
    sample denoise, with an event for each step, and decode. Begins when the job is submitted."""

    def __init__(self) -> None:
        self._submitted = time.time_ns()
        self._encoded = self._submitted
        self._denoising: dict[int, Span] = {}
        self._denoised: dict[int, int] = {}

    def note(self, at: int, event: EngineEvent) -> None:
        """Takes in an event and when the engine told it, in Unix nanoseconds."""
        match event:
            case StageDone(stage=Stage.IMAGE_ENCODED):
                TRACER.start_span("encode", start_time=self._submitted).end(at)
                self._encoded = at
            case StepDone():
                self._step(at, event)
            case SampleReady(sample=sample) if sample in self._denoised:
                span = TRACER.start_span("decode", start_time=self._denoised.pop(sample))
                span.set_attribute("img2img.sample", sample)
                span.end(at)

    def _step(self, at: int, event: StepDone) -> None:
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

    def close(self) -> None:
        """Ends what a cancel or an error left open."""
        for span in self._denoising.values():
            span.end()
