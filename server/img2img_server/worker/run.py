"""One job on this worker, from the delivery to its ack."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog

from img2img_server import errors
from img2img_server.domain.events import (
    Cancelled,
    Event,
    Failed,
    Preview,
    Queued,
    StageFinished,
    Started,
    StepFinished,
    Succeeded,
)
from img2img_server.domain.job import IllegalTransitionError, Job, State, advance
from img2img_server.engine.base import (
    EngineEvent,
    EngineJob,
    EngineTimings,
    JobDone,
    JobError,
    JobStopped,
    PreviewReady,
    SampleReady,
    StageDone,
    StepDone,
)
from img2img_server.images.encode import preview_jpeg
from img2img_server.images.prepare import prepare_image
from img2img_server.queue.base import Delivery, EventWriter, OwnershipLostError
from img2img_server.store.base import ConflictError
from img2img_server.telemetry import JOBS_ENDED, REDELIVERIES, STAGE_SECONDS, STEPS
from img2img_server.worker.parts import Parts
from img2img_server.worker.sample import finish_sample

log = structlog.get_logger()


class _StoppedError(Exception):
    """The engine ended the job because it was asked to."""


@dataclass
class _Stopwatch:
    """Seconds of the stages that lie outside the engine, added up over the samples."""

    prepare: float = 0.0
    safety: float = 0.0
    image_encode: float = 0.0
    upload: float = 0.0


class JobRun:
    """Takes one delivered job to its end. `cancel` and `hand_back` may be called meanwhile.

    The record is compared-and-swapped at the start and at the end; the log is fenced. A run that
    loses either has lost the job to another worker and leaves it alone.
    """

    def __init__(self, parts: Parts, delivery: Delivery) -> None:
        self._parts = parts
        self._delivery = delivery
        self._watch = _Stopwatch()
        self._emit_lock = asyncio.Lock()
        self._cancelled = False
        self._leaving = False
        self._submitted = False
        self._job: Job
        self._revision = 0
        self._writer: EventWriter

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
        self._leaving = True
        self._parts.engine.cancel(self.job_id)

    def adopt(self, delivery: Delivery) -> None:
        """Goes on under a newer delivery of the same job: the older one's clock has run out."""
        self._delivery = delivery

    async def run(self) -> None:
        """Returns when the job has ended or is no longer ours; never raises for the job's sake."""
        heartbeat = asyncio.create_task(self._heartbeat())
        try:
            if await self._begin():
                await self._work()
        except (OwnershipLostError, IllegalTransitionError) as error:
            log.warning("job lost to another worker", job=self.job_id, why=str(error))
        except errors.UnavailableError as error:
            # Not acked: it comes again when the bus does.
            log.warning("job let go, the bus is away", job=self.job_id, why=str(error))
        finally:
            heartbeat.cancel()
            if self._submitted:
                self._parts.engine.cancel(self.job_id)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(self._parts.queue.ack_wait_seconds / 3)
            with suppress(errors.UnavailableError):
                await self._delivery.in_progress()

    async def _begin(self) -> bool:
        """Takes the job over; False when there is nothing (more) to do."""
        delivery, parts = self._delivery, self._parts
        stored = await parts.jobs.get(delivery.job.tenant, self.job_id)
        if stored is None:
            await delivery.term("its record has expired")
            return False
        self._job, self._revision = stored.job, stored.revision
        self._writer = await parts.events.open(self.job_id)
        if self._job.state.is_terminal:
            await self._last_word()
            return False
        if self._job.cancel_requested or self._cancelled:
            await self._end(Cancelled())
            return False
        if delivery.attempt - self._job.handed_back > parts.max_attempts:
            await self._fail(errors.AttemptsExhaustedError(parts.max_attempts), dead=True)
            return False
        if self._job.state is State.RUNNING:
            REDELIVERIES.inc()
        started = Started(
            worker=parts.name, model=parts.engine.model.name, attempt=delivery.attempt
        )
        await self._swap(started)
        await self._emit(started)
        return True

    async def _last_word(self) -> None:
        """The record has ended: says so in the log if its writer died before it could."""
        if not self._writer.ended:
            await self._emit(terminal_event(self._job))
        await self._delivery.ack()

    async def _work(self) -> None:
        try:
            timings = await self._follow(await self._submit())
        except _StoppedError:
            if self._cancelled:
                await self._end(Cancelled())
            else:
                await self._give_back()
        except (OwnershipLostError, IllegalTransitionError, errors.UnavailableError):
            raise
        except Exception as error:
            await self._fail(error)
        else:
            await self._succeed(timings)

    async def _submit(self) -> asyncio.Queue[EngineEvent]:
        params, start = self._job.params, time.monotonic()
        queued = self._delivery.job
        pixels = await asyncio.to_thread(
            prepare_image,
            queued.init_image,
            width=params.width,
            height=params.height,
            prepared=queued.init_image_prepared,
        )
        self._watch.prepare = time.monotonic() - start
        info = self._parts.engine.model
        guidance = params.guidance_scale
        inbox: asyncio.Queue[EngineEvent] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._parts.engine.submit(
            EngineJob(
                job_id=self.job_id,
                tenant=self._job.tenant,
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
            ),
            lambda event: _post(loop, inbox, event),
        )
        self._submitted = True
        if self._leaving:  # asked while the image was prepared
            self._parts.engine.cancel(self.job_id)
        return inbox

    async def _follow(self, inbox: asyncio.Queue[EngineEvent]) -> EngineTimings:
        """Turns engine events into job events; returns when every picture is stored."""
        try:
            async with asyncio.TaskGroup() as finishing:
                while True:
                    match await inbox.get():
                        case StageDone() as it:
                            await self._emit(StageFinished(stage=it.stage))
                        case StepDone() as it:
                            await self._emit(
                                StepFinished(
                                    sample=it.sample, step=it.step, total=it.total, sigma=it.sigma
                                )
                            )
                        case PreviewReady() as it:
                            image = await asyncio.to_thread(preview_jpeg, it.pixels)
                            await self._emit(Preview(sample=it.sample, step=it.step, image=image))
                        case SampleReady() as it:
                            finishing.create_task(self._finish(it))
                        case JobDone() as it:
                            return it.timings
                        case JobError() as it:
                            raise it.error
                        case JobStopped():
                            raise _StoppedError
        except BaseExceptionGroup as group:
            raise _first(group) from group

    async def _finish(self, ready: SampleReady) -> None:
        async for event in finish_sample(self._parts, self._job, ready, self._watch):
            await self._emit(event)
            self._job = advance(self._job, event, time.time())

    async def _emit(self, event: Event) -> None:
        async with self._emit_lock:
            await self._writer.append(event)

    async def _succeed(self, timings: EngineTimings) -> None:
        parts, watch = self._parts, self._watch
        self._job = replace(
            self._job,
            device=parts.engine.device,
            determinism=parts.engine.determinism,
            timings=replace(
                self._job.timings,
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
            ),
        )
        parts.pace.observe(self._job.params, timings.engine)
        STEPS.inc(timings.steps)
        await self._end(Succeeded())

    async def _fail(self, error: Exception, *, dead: bool = False) -> None:
        if not isinstance(error, errors.JobFailedError):
            log.error("job broke", job=self.job_id, exc_info=error)
            error = errors.EngineError("the job broke inside the service")
        failed = Failed(reason=error.reason, message=str(error), retryable=error.retryable)
        await self._end(failed, dead_reason=error.reason if dead else None)

    async def _end(self, event: Event, *, dead_reason: str | None = None) -> None:
        """Record, then log, then ack: whoever crashes between leaves what the next one needs."""
        await self._swap(event)
        await self._emit(event)
        if dead_reason:
            await self._delivery.term(dead_reason)
        else:
            await self._delivery.ack()
        job = self._job
        JOBS_ENDED.labels(job.params.model, job.state).inc()
        for stage in ("queue", "fetch", "prepare", "engine", "safety", "upload", "total"):
            STAGE_SECONDS.labels(stage).observe(getattr(job.timings, stage))
        log.info(
            "job ended",
            job=job.id,
            state=job.state,
            reason=job.failure.reason if job.failure else "",
            seconds=round(job.timings.total, 3),
            attempt=job.attempt,
        )

    async def _give_back(self) -> None:
        event = Queued(requeue_reason="worker stopped")
        await self._swap(event)
        await self._emit(event)
        await self._delivery.nak()
        log.info("job handed back", job=self.job_id)

    async def _swap(self, event: Event) -> None:
        """Advances the record. A cancel request may have changed it meanwhile; nothing else may."""
        while True:
            job = advance(self._job, event, time.time())
            try:
                self._revision = await self._parts.jobs.update(job, self._revision)
                self._job = job
                return
            except ConflictError:
                stored = await self._parts.jobs.get(job.tenant, job.id)
                if stored is None or stored.job.attempt != self._job.attempt:
                    raise OwnershipLostError(f"the record of job {job.id} moved on") from None
                if stored.job.state is not self._job.state:
                    raise IllegalTransitionError(stored.job, event) from None
                self._revision = stored.revision
                self._job = replace(
                    self._job,
                    cancel_requested=stored.job.cancel_requested,
                    queue_sequence=stored.job.queue_sequence,
                )


def terminal_event(job: Job) -> Event:
    """The terminal event that belongs to an ended record."""
    if job.state is State.SUCCEEDED:
        return Succeeded()
    if job.state is State.CANCELLED:
        return Cancelled()
    assert job.failure is not None
    failure = job.failure
    return Failed(reason=failure.reason, message=failure.message, retryable=failure.retryable)


def _post(
    loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[EngineEvent], event: EngineEvent
) -> None:
    with suppress(RuntimeError):  # the loop is gone: nobody listens any more
        loop.call_soon_threadsafe(inbox.put_nowait, event)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
