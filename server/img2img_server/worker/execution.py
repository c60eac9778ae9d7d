"""Runs one job on this worker: from its delivery through the engine to its end."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import structlog
from opentelemetry.trace import Span, SpanKind

from img2img_server import clock, errors
from img2img_server.domain.events import Cancelled, Preview, StepFinished, Succeeded
from img2img_server.domain.job import IllegalTransitionError, Job, Timings
from img2img_server.domain.params import JobParams
from img2img_server.domain.warnings import join_warnings
from img2img_server.engine.base import (
    RESTARTED_WARNING,
    DeviceLost,
    JobDone,
    JobFailed,
    JobState,
    JobStopped,
    JobSuspended,
    PreviewReady,
    SampleReady,
)
from img2img_server.imaging.base import InvalidImageError, Pixels
from img2img_server.imaging.encode import preview_jpeg
from img2img_server.interfaces.queue import Delivery, OwnershipLostError, size_of
from img2img_server.interfaces.states import remove_state
from img2img_server.lifecycle import first_of
from img2img_server.tasks import background_task
from img2img_server.telemetry import STEPS
from img2img_server.tracing import enter, extracted
from img2img_server.worker.deps import WorkerDeps
from img2img_server.worker.dispatch import HeldJob, Phase
from img2img_server.worker.engine_events import EngineEventStream, engine_job, job_plan, trace_waits
from img2img_server.worker.lease import DELIVERIES_OF_AN_ATTEMPT, JobLease, counted_attempts
from img2img_server.worker.sample import Stopwatch, finish_sample, storage_warning
from img2img_server.worker.states import (
    OTHERS_PAUSE_SECONDS,
    is_for_others,
    load_state,
    store_state,
)

log = structlog.get_logger()

STEPS_WORTH_MOVING = 2  # Fewer steps run faster than a job moves.
NAK_SECONDS = 2.0  # seconds; longest time of a nak at shutdown
_NOT_OURS = (OwnershipLostError, IllegalTransitionError)


class _StoppedError(Exception):
    """The engine stopped the job on request."""


class _SuspendedError(Exception):
    """The engine suspended the job on request."""

    def __init__(self, event: JobSuspended) -> None:
        super().__init__("the job is suspended")
        self.event = event


class _DeviceLostError(Exception):
    """The device broke in a step of the job."""


class JobExecution:
    """Runs one delivered job to its end. `cancel` and `hand_back` may be called meanwhile."""

    def __init__(self, deps: WorkerDeps, delivery: Delivery) -> None:
        self._deps = deps
        self._delivery = delivery
        self._watch = Stopwatch()
        self._pulled_time = clock.now()
        self._cancelled = False
        self.opened = asyncio.Event()  # The record was read, or the run has ended.
        self._leaving = asyncio.Event()
        self._abandoned = asyncio.Event()  # Uploads are not waited for any more.
        self._requeue_reason = ""
        self._submitted = False
        self._sample_error: errors.JobFailedError | None = None
        self._lease: JobLease | None = None
        self._held: HeldJob | None = None
        self._steps_left: dict[int, int] = {}  # by sample, once it took a step here

    @property
    def job_id(self) -> int:
        return self._delivery.job.job_id

    @property
    def job(self) -> Job | None:
        """The job as this run has read it; None before its record was read."""
        return self._lease.job if self._lease else None

    def cancel(self) -> None:
        """Ends the job as cancelled at its next step, or at once if it has finished its steps."""
        self._cancelled = True
        self._abandoned.set()
        self._leaving.set()
        self._deps.engine.cancel(self.job_id)

    def hand_back(self, reason: str = "worker stopped") -> None:
        """Ends the run at its next step and requeues the job for another worker, which continues
        with the steps that are left.

        Uploads may finish, unless they wait for a store that cannot be used.
        """
        if self._deps.blobs.trouble:
            self._abandoned.set()
        self._requeue_reason = reason
        self._leaving.set()
        self._deps.engine.suspend(self.job_id)

    @property
    def is_worth_moving(self) -> bool:
        """Returns whether the job runs and has so many steps left that another worker should
        continue it."""
        left = self._steps_left.values()
        return bool(left) and max(left) >= STEPS_WORTH_MOVING and not self._leaving.is_set()

    def hand_back_waiting(self) -> bool:
        """Requeues the job if it has not begun; returns whether it has not."""
        if self._held is None or self._held.phase is not Phase.WAITS:
            return False
        self._leaving.set()
        return True

    def adopt(self, delivery: Delivery) -> None:
        """Continues with a newer delivery of the same job. The older delivery has expired."""
        self._delivery = delivery
        if self._lease:
            self._lease.delivery = delivery

    async def run(self) -> None:
        """Runs the job. Returns when it has ended or another worker has it. Raises no error of the
        job.
        """
        span = self._enter_span()
        watching = [
            asyncio.create_task(self._heartbeat()),
            asyncio.create_task(self._poll_cancel()),
        ]
        try:
            self._lease = await self._open()
            if self._lease and not await self._lease.settle(cancelled=self._cancelled):
                if is_for_others(self._deps, self._lease.job):
                    self._deps.dispatcher.pause(OTHERS_PAUSE_SECONDS)
                    await self._lease.exclude_delivery()
                    await self._nak()
                    return
                # Preparing the init image and taking the record are equally slow, so both run
                # together.
                async with background_task(self._prepare(self._lease.job.params)) as prepared:
                    if await self._begun(self._lease.job):
                        await self._take_and_work(prepared)
                    else:
                        await self._nak()
        except _NOT_OURS as error:
            log.warning("job_lost", why=str(error))
        except errors.UnavailableError as error:
            log.warning("nats_unavailable_job_will_be_redelivered", why=str(error))
        except _DeviceLostError:  # The attempt counts, because the job may have broken the device.
            await self._leaving.wait()  # Without this pause, this worker would pull the job again.
            await self._nak()
        except asyncio.CancelledError:  # The drain time has expired.
            await self._nak()
            raise
        except Exception as error:  # an unexpected error, for example a record that cannot be read
            await self._retry_or_dead_letter(error)
        finally:
            self.opened.set()
            for task in watching:
                task.cancel()
            if self._held:
                gives = self._held.phase is Phase.WAITS
                self._deps.dispatcher.remove(self._held, requeued=gives)
            if self._submitted:
                self._deps.engine.cancel(self.job_id)
            span.end()

    def _enter_span(self) -> Span:
        """Starts the span of the whole run. It is current in this task and in the tasks that it
        starts.
        """
        queued = self._delivery.job
        attributes = {
            "img2img.job": f"jobs/{queued.job_id}",
            "img2img.tenant": queued.tenant,
            "img2img.model": self._deps.engine.model.name,
            "img2img.attempt": self._delivery.attempt,
        }
        return enter("run job", extracted(queued.trace.items()), SpanKind.CONSUMER, attributes)

    async def _retry_or_dead_letter(self, error: Exception) -> None:
        """Lets the message be redelivered, or dead-letters it after the last delivery."""
        log.error("job_execution_failed", delivery=self._delivery.attempt, exc_info=error)
        lease = self._lease
        deliveries = lease.counted_deliveries if lease else self._delivery.attempt
        most = self._deps.max_attempts
        if self._held:  # It may have been delivered often for workers that were idle.
            most *= DELIVERIES_OF_AN_ATTEMPT
        if deliveries >= most:
            with suppress(errors.UnavailableError):
                await self._delivery.term(f"its execution failed: {type(error).__name__}")

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(self._deps.queue.ack_wait_seconds / 3)
            with suppress(errors.UnavailableError):
                await self._delivery.in_progress()

    async def _poll_cancel(self) -> None:
        """Cancels a job whose record requests it: a reconnect can lose the cancel message."""
        queued = self._delivery.job
        while True:
            await asyncio.sleep(self._deps.queue.ack_wait_seconds / 3)
            with suppress(errors.UnavailableError):
                stored = await self._deps.jobs.get(queued.tenant, queued.job_id)
                if stored and stored.job.cancel_requested and not self._cancelled:
                    self.cancel()
                elif stored is None or stored.job.state.is_terminal:
                    self.hand_back_waiting()

    async def _nak(self) -> None:
        """Requeues the message at once and leaves the record unchanged."""
        with suppress(errors.UnavailableError, TimeoutError):
            async with asyncio.timeout(NAK_SECONDS):
                await self._delivery.nak()

    async def _open(self) -> JobLease | None:
        stored, writer = await asyncio.gather(
            self._deps.jobs.get(self._delivery.job.tenant, self.job_id),
            self._deps.events.open(self.job_id, tenant=self._delivery.job.tenant),
        )
        if stored is None:
            await self._delivery.term("its record has expired")
            return None
        if not self._delivery.job.is_of(stored.job):
            await self._delivery.ack()
            log.info("job_message_abandoned")
            return None
        return JobLease(self._deps, self._delivery, stored, writer, self._pulled_time)

    async def _begun(self, job: Job) -> bool:
        """Waits until the job may begin. Returns False if another worker should have it."""
        deps = self._deps
        size = size_of(deps.engine.model.work(job.params))
        self._held = held = deps.dispatcher.add(job_plan(job), size, counted_attempts(job))
        self.opened.set()
        if held.may_begin.is_set():
            return True
        async with deps.queue.on_wanted(deps.engine.model.name, self._on_wanted):
            await first_of(held.may_begin.wait(), self._leaving.wait())
        if not held.may_begin.is_set() and not self._cancelled:
            return False
        # The caller may have cancelled the job meanwhile.
        self._lease = await self._open()
        return True

    async def _on_wanted(self) -> None:
        self.hand_back_waiting()

    async def _take_and_work(self, prepared: asyncio.Task[Pixels]) -> None:
        lease = self._lease
        if lease is None:
            return
        suspended, state = lease.job.suspended, await load_state(self._deps, lease.job)
        if suspended and state:
            lease.resume(suspended.done_steps)
        elif suspended:
            warning = join_warnings(lease.job.warning, RESTARTED_WARNING)
            lease.job = replace(lease.job, warning=warning)
        is_taken = await lease.take(cancelled=self._cancelled)
        if is_taken:
            await remove_state(self._deps.states, suspended)
            await self._work(lease, prepared, state)

    async def _work(
        self, lease: JobLease, prepared: asyncio.Task[Pixels], state: JobState | None
    ) -> None:
        try:
            async with background_task(lease.append_started()) as started:
                try:
                    events = self._submit(lease.job, await _checked_pixels(prepared), state)
                except Exception:
                    await started  # The log must have the start before the failure.
                    raise
                await started
            done = await self._follow(lease, events)
        except _StoppedError:
            if self._cancelled:
                await lease.finish(Cancelled())
            else:
                await lease.hand_back(self._requeue_reason)
        except _SuspendedError as error:
            await self._hand_over(lease, error.event)
        except (*_NOT_OURS, _DeviceLostError, errors.UnavailableError):
            raise
        except Exception as error:
            if lease.may_be_partial:
                engine = self._deps.engine
                lease.job = replace(
                    lease.job,
                    device=engine.device,
                    determinism=engine.determinism,
                    timings=lease.job.timings + self._watch.timings(()),
                )
            await lease.fail(error)
        else:
            await self._succeed(lease, done)

    async def _hand_over(self, lease: JobLease, event: JobSuspended) -> None:
        """Requeues a suspended job with its state."""
        if self._cancelled:
            await lease.finish(Cancelled())
            return
        suspended = await store_state(self._deps, lease.job, event.state)
        times = replace(self._watch.timings(event.spans), engine=event.engine_seconds)
        await lease.hand_back(self._requeue_reason, suspended, lease.job.timings + times)

    async def _prepare(self, params: JobParams) -> Pixels:
        queued = self._delivery.job
        with self._watch.measure("prepare"):
            return await self._deps.decoder.prepare(
                queued.tenant,
                queued.init_image,
                width=params.width,
                height=params.height,
                prepared=queued.init_image_prepared,
            )

    def _submit(self, job: Job, pixels: Pixels, state: JobState | None) -> EngineEventStream:
        engine, events = self._deps.engine, EngineEventStream()
        assert self._held is not None
        engine.submit(engine_job(self._held.plan, pixels, state), events.post)
        self._submitted = self._held.is_submitted = True
        if self._leaving.is_set():  # The end was requested while the image was prepared.
            (engine.cancel if self._cancelled else engine.suspend)(job.id)
        return events

    async def _follow(self, lease: JobLease, events: EngineEventStream) -> JobDone:
        """Appends the engine's events to the log; returns when every image is stored."""
        try:
            async with asyncio.TaskGroup() as finishing:
                uploads: set[asyncio.Task[None]] = set()
                while True:
                    match event := await events.get():
                        case SampleReady():
                            sample = self._finish(lease, event, events.posted)
                            uploads.add(finishing.create_task(sample))
                            del event  # It holds the pixels.
                        case PreviewReady(sample=sample, step=step, pixels=pixels):
                            image = await asyncio.to_thread(preview_jpeg, pixels)
                            await lease.append(Preview(sample=sample, step=step, image=image))
                        case JobDone():
                            self._free_device()
                            await self._all_stored(uploads)
                            return event
                        case JobFailed():
                            if lease.may_be_partial:
                                await self._all_stored(uploads)
                            raise event.error
                        case JobStopped():
                            raise _StoppedError
                        case JobSuspended():
                            await self._all_stored(uploads)
                            raise _SuspendedError(event)
                        case DeviceLost():
                            self._deps.device_lost.set()
                            raise _DeviceLostError from event.error
                        case _:
                            if isinstance(event, StepFinished):
                                self._steps_left[event.sample] = event.total - event.step
                                self._count_step(lease.job)
                            await lease.append(event)
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            events.close()

    async def _all_stored(self, uploads: set[asyncio.Task[None]]) -> None:
        """Waits for the uploads. Raises _StoppedError if they are abandoned before."""
        async with background_task(self._abandoned.wait()) as abandoned:
            while uploads and not abandoned.done():
                done, _ = await asyncio.wait(
                    {*uploads, abandoned}, return_when=asyncio.FIRST_COMPLETED
                )
                uploads -= done
        if uploads or self._cancelled:
            raise _StoppedError

    def _count_step(self, job: Job) -> None:
        deps = self._deps
        model, params = deps.engine.model, job.params
        pixels = params.width * params.height * model.forwards(params)
        deps.throughput.count_step(params, pixels / model.native_size**2)
        deps.usage.add_step(job.tenant, job.params, deps.throughput.pixel_step_seconds)
        deps.dispatcher.check()

    def _free_device(self) -> None:
        if self._held:
            self._deps.dispatcher.finish(self._held)

    async def _finish(self, lease: JobLease, ready: SampleReady, began: float) -> None:
        finishing = finish_sample(
            self._deps, lease.job, ready, self._watch, began, lease.record_waiting
        )
        index = ready.sample
        del ready  # It holds the pixels.
        try:
            async for event in finishing:
                await lease.record_sample(event)
        except errors.JobFailedError as error:
            if not lease.may_be_partial:
                raise
            await lease.record_failure(index, error)
            self._sample_error = error

    async def _succeed(self, lease: JobLease, done: JobDone) -> None:
        engine, job = self._deps.engine, lease.job
        lease.job = replace(
            job,
            device=engine.device,
            determinism=engine.determinism,
            denoising_steps=done.denoising_steps,
            start_noise=done.start_noise,
            device_seconds=done.device_seconds,
            timings=self._timings(job, done),
            warning=join_warnings(
                job.warning, *done.warnings, storage_warning(job, self._deps.retention_hours)
            ),
        )
        trace_waits(job, self._watch.pulled, done.spans)
        if not job.resumes:  # Another worker did a part of the work.
            self._deps.throughput.observe(job.params, done.timings, engine.model.work(job.params))
        STEPS.inc(done.timings.steps)
        if self._sample_error:  # The job succeeds if another sample is stored.
            await lease.fail(self._sample_error)
        else:
            await lease.finish(Succeeded())

    def _timings(self, job: Job, done: JobDone) -> Timings:
        watch = self._watch
        if watch.spans:  # Reporting the last file is a part of its upload.
            watch.note("upload", max(span.ended for span in watch.spans))
        here = watch.timings(done.spans)
        of_engine = {
            name: getattr(done.timings, name) for name in ("engine", "steps", "batch_share")
        }
        return job.timings + replace(here, **of_engine)


async def _checked_pixels(prepared: asyncio.Task[Pixels]) -> Pixels:
    try:
        return await prepared
    except InvalidImageError as error:
        raise errors.InitImageError(str(error)) from error


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
