"""One job on this worker: from its delivery through the engine to its end."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

import structlog

from img2img_server import errors
from img2img_server.domain.events import (
    Cancelled,
    Preview,
    StageFinished,
    StepFinished,
    Succeeded,
)
from img2img_server.domain.job import IllegalTransitionError, Job
from img2img_server.engine.base import (
    DeviceLost,
    EngineEvent,
    EngineJob,
    EngineTimings,
    JobDone,
    JobError,
    JobStopped,
    Pixels,
    PreviewReady,
    SampleReady,
    StageDone,
    StepDone,
)
from img2img_server.images.base import InvalidImageError
from img2img_server.images.encode import preview_jpeg
from img2img_server.images.prepare import prepare_image
from img2img_server.queue.base import Delivery, OwnershipLostError
from img2img_server.tasks import beside
from img2img_server.telemetry import STEPS
from img2img_server.tracing import TRACER
from img2img_server.worker.files import storage_warning
from img2img_server.worker.owned import OwnedJob
from img2img_server.worker.parts import Parts
from img2img_server.worker.sample import finish_sample
from img2img_server.worker.spans import DeviceSpans, enter_run

log = structlog.get_logger()

# What the engine tells, and when in Unix nanoseconds.
_Inbox: TypeAlias = "asyncio.Queue[tuple[int, EngineEvent]]"
LET_GO_SECONDS = 2.0
_NOT_OURS = (OwnershipLostError, IllegalTransitionError)


class _StoppedError(Exception):
    """The engine ended the job because it was asked to."""


class _DeviceLostError(Exception):
    """The device broke in a step of the job."""


@dataclass
class _Stopwatch:
    """Seconds of the stages that lie outside the engine, added up over the samples."""

    prepare: float = 0.0
    safety: float = 0.0
    image_encode: float = 0.0
    upload: float = 0.0


class JobRun:
    """Takes one delivered job to its end. `cancel` and `hand_back` may be called meanwhile."""

    def __init__(self, parts: Parts, delivery: Delivery) -> None:
        self._parts = parts
        self._delivery = delivery
        self._watch = _Stopwatch()
        self._cancelled = False
        self._leaving = asyncio.Event()
        self._submitted = False
        self._owned: OwnedJob | None = None

    @property
    def job_id(self) -> int:
        return self._delivery.job.job_id

    @property
    def samples(self) -> int:
        return self._delivery.job.params.samples

    def cancel(self) -> None:
        """Ends the job as cancelled at its next step."""
        self._cancelled = True
        self.hand_back()

    def hand_back(self) -> None:
        """Ends the run at its next step and gives the job to another worker."""
        self._leaving.set()
        self._parts.engine.cancel(self.job_id)

    def adopt(self, delivery: Delivery) -> None:
        """Goes on under a newer delivery of the same job: the older one's clock has run out."""
        self._delivery = delivery
        if self._owned:
            self._owned.delivery = delivery

    async def run(self) -> None:
        """Returns when the job has ended or is no longer ours; never raises for the job's sake."""
        span = enter_run(self._delivery)
        beside = [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._hear())]
        # Beside the records, not after them: it takes as long as they do.
        prepared = asyncio.create_task(self._prepare())
        try:
            self._owned = await self._open()
            if self._owned and await self._owned.take(cancelled=self._cancelled):
                await self._work(self._owned, prepared)
        except _NOT_OURS as error:
            log.warning("job lost to another worker", why=str(error))
        except errors.UnavailableError as error:
            # Not acked: it comes again when the bus does.
            log.warning("job let go, the bus is away", why=str(error))
        except _DeviceLostError:  # for another worker, and counted: it may be the job's own doing
            await self._leaving.wait()  # or this worker would pull it again
            await self._let_go()
        except asyncio.CancelledError:  # the drain is over
            await self._let_go()
            raise
        except Exception as error:  # a record that cannot be read, a fault of ours: not its
            await self._bury(error)  # neighbours' business
        finally:
            for task in beside:
                task.cancel()
            prepared.cancel()
            await asyncio.gather(prepared, return_exceptions=True)
            if self._submitted:
                self._parts.engine.cancel(self.job_id)
            span.end()

    async def _bury(self, error: Exception) -> None:
        """Leaves the job to another try, and to the dead letters when there were enough."""
        log.error("run broke", attempt=self._delivery.attempt, exc_info=error)
        if self._delivery.attempt >= self._parts.max_attempts:
            with suppress(errors.UnavailableError):
                await self._delivery.term(f"its run broke: {type(error).__name__}")

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(self._parts.queue.ack_wait_seconds / 3)
            with suppress(errors.UnavailableError):
                await self._delivery.in_progress()

    async def _hear(self) -> None:
        """Cancels a job whose record says so: the word itself may have come while the connection
        was away."""
        job = self._delivery.job
        while True:
            await asyncio.sleep(self._parts.queue.ack_wait_seconds / 3)
            with suppress(errors.UnavailableError):
                stored = await self._parts.jobs.get(job.tenant, job.job_id)
                if stored and stored.job.cancel_requested and not self._cancelled:
                    self.cancel()

    async def _let_go(self) -> None:
        """Gives the message to another worker at once, the record as it is."""
        with suppress(errors.UnavailableError, TimeoutError):
            async with asyncio.timeout(LET_GO_SECONDS):
                await self._delivery.nak()

    async def _open(self) -> OwnedJob | None:
        stored, writer = await asyncio.gather(
            self._parts.jobs.get(self._delivery.job.tenant, self.job_id),
            self._parts.events.open(self.job_id),
        )
        if stored is None:
            await self._delivery.term("its record has expired")
            return None
        return OwnedJob(self._parts, self._delivery, stored, writer)

    async def _work(self, owned: OwnedJob, prepared: asyncio.Task[Pixels]) -> None:
        try:
            async with beside(owned.announce()) as announced:
                inbox = self._submit(owned.job, await _sound(prepared))
                await announced
            timings = await self._follow(owned, inbox)
        except _StoppedError:
            if self._cancelled:
                await owned.end(Cancelled())
            else:
                await owned.hand_back()
        except (*_NOT_OURS, _DeviceLostError, errors.UnavailableError):
            raise
        except Exception as error:
            await owned.fail(error)
        else:
            await self._succeed(owned, timings)

    async def _prepare(self) -> Pixels:
        queued, start = self._delivery.job, time.monotonic()
        with TRACER.start_as_current_span("prepare"):
            pixels = await asyncio.to_thread(
                prepare_image,
                queued.init_image,
                width=queued.params.width,
                height=queued.params.height,
                prepared=queued.init_image_prepared,
            )
        self._watch.prepare = time.monotonic() - start
        return pixels

    def _submit(self, job: Job, pixels: Pixels) -> _Inbox:
        params, info = job.params, self._parts.engine.model
        guidance = params.guidance_scale
        inbox: _Inbox = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._parts.engine.submit(
            EngineJob(
                job_id=job.id,
                tenant=job.tenant,
                lane=params.lane,
                prompt=params.prompt,
                negative_prompt=params.negative_prompt,
                init_image=pixels,
                strength=params.strength,
                seeds=tuple(params.sample_seed(index) for index in range(params.samples)),
                num_inference_steps=params.num_inference_steps or info.default_num_inference_steps,
                guidance_scale=info.default_guidance_scale if guidance is None else guidance,
                scheduler=params.scheduler or info.schedulers[0],
                preview_interval_steps=params.preview_interval_steps,
                enqueue_time=time.monotonic(),
                lora=params.lora,
                lora_scale=params.lora_scale,
                deadline=_monotonic(job.deadline_time),
            ),
            lambda event: _post(loop, inbox, event),
        )
        self._submitted = True
        if self._leaving.is_set():  # asked while the image was prepared
            self._parts.engine.cancel(job.id)
        return inbox

    async def _follow(self, owned: OwnedJob, inbox: _Inbox) -> EngineTimings:
        """Turns engine events into job events; returns when every picture is stored."""
        spans = DeviceSpans()
        try:
            async with asyncio.TaskGroup() as finishing:
                while True:
                    at, event = await inbox.get()
                    spans.note(at, event)
                    match event:
                        case SampleReady():
                            finishing.create_task(self._finish(owned, event))
                        case JobDone():
                            return event.timings
                        case JobError():
                            raise event.error
                        case JobStopped():
                            raise _StoppedError
                        case DeviceLost():
                            self._parts.device_lost.set()
                            raise _DeviceLostError from event.error
                        case _:
                            if isinstance(event, StepDone):
                                self._parts.pace.step(owned.job.params)
                            await owned.tell(await _told(event))
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            spans.close()

    async def _finish(self, owned: OwnedJob, ready: SampleReady) -> None:
        async for event in finish_sample(self._parts, owned.job, ready, self._watch):
            await owned.note(event)

    async def _succeed(self, owned: OwnedJob, timings: EngineTimings) -> None:
        engine, watch, job = self._parts.engine, self._watch, owned.job
        stages = replace(
            job.timings,
            prepare=watch.prepare,
            encode=timings.encode,
            denoise=timings.denoise,
            decode=timings.decode,
            safety=watch.safety,
            image_encode=watch.image_encode,
            upload=watch.upload,
            engine=timings.engine,
            steps=timings.steps,
            batch_share=timings.batch_share,
        )
        warnings = (job.warning, storage_warning(job, self._parts.retention_hours))
        owned.job = replace(
            job,
            device=engine.device,
            determinism=engine.determinism,
            timings=stages,
            warning="; ".join(filter(None, warnings)),
        )
        self._parts.pace.observe(job.params, timings.engine)
        STEPS.inc(timings.steps)
        await owned.end(Succeeded())


async def _sound(prepared: asyncio.Task[Pixels]) -> Pixels:
    try:
        return await prepared
    except InvalidImageError as error:
        raise errors.InitImageError(str(error)) from error


async def _told(
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


def _post(loop: asyncio.AbstractEventLoop, inbox: _Inbox, event: EngineEvent) -> None:
    with suppress(RuntimeError):  # the loop is gone: nobody listens any more
        loop.call_soon_threadsafe(inbox.put_nowait, (time.time_ns(), event))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
