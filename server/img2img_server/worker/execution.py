"""One job on this worker: from its delivery through the engine to its end."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img_server import errors
from img2img_server.domain.events import (
    Cancelled,
    Succeeded,
)
from img2img_server.domain.job import IllegalTransitionError, Job
from img2img_server.domain.params import JobParams
from img2img_server.domain.warnings import join_warnings
from img2img_server.engine.base import (
    DeviceLost,
    JobDone,
    JobFailed,
    JobStopped,
    Pixels,
    SampleReady,
    StepDone,
)
from img2img_server.imaging.base import InvalidImageError
from img2img_server.imaging.prepare import prepare_image
from img2img_server.interfaces.queue import Delivery, OwnershipLostError
from img2img_server.tasks import background_task
from img2img_server.telemetry import STEPS
from img2img_server.tracing import TRACER
from img2img_server.worker.deps import WorkerDeps
from img2img_server.worker.engine_events import EngineEventStream, engine_job, to_domain_event
from img2img_server.worker.files import storage_warning
from img2img_server.worker.lease import JobLease
from img2img_server.worker.sample import Stopwatch, finish_sample
from img2img_server.worker.spans import enter_run

log = structlog.get_logger()

LET_GO_SECONDS = 2.0  # for handing a message back when everything ends
_NOT_OURS = (OwnershipLostError, IllegalTransitionError)


class _StoppedError(Exception):
    """The engine ended the job because it was asked to."""


class _DeviceLostError(Exception):
    """The device broke in a step of the job."""


class JobExecution:
    """Takes one delivered job to its end. `cancel` and `hand_back` may be called meanwhile."""

    def __init__(self, parts: WorkerDeps, delivery: Delivery) -> None:
        self._parts = parts
        self._delivery = delivery
        self._watch = Stopwatch()
        self._cancelled = False
        self.opened = asyncio.Event()  # the record was read, or the run has ended
        self._leaving = asyncio.Event()
        self._submitted = False
        self._owned: JobLease | None = None

    @property
    def job_id(self) -> int:
        return self._delivery.job.job_id

    @property
    def job(self) -> Job | None:
        """The job as this run knows it; None while its record was not read."""
        return self._owned.job if self._owned else None

    @property
    def forwards(self) -> int:
        """Returns the forwards of one step of all samples; 0 without a record of the job."""
        if self.job is None:
            return 0
        params, model = self.job.params, self._parts.engine.model
        return params.samples * model.guidance.forwards(params.guidance_scale or 0.0)

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
        span = enter_run(self._delivery, self._parts.engine.model.name)
        watching = [
            asyncio.create_task(self._heartbeat()),
            asyncio.create_task(self._poll_cancel()),
        ]
        try:
            self._owned = await self._open()
            self.opened.set()
            if self._owned:
                # Preparing the init image takes as long as taking the record: both run together.
                async with background_task(self._prepare(self._owned.job.params)) as prepared:
                    if await self._owned.take(cancelled=self._cancelled):
                        await self._work(self._owned, prepared)
        except _NOT_OURS as error:
            log.warning("job lost to another worker", why=str(error))
        except errors.UnavailableError as error:
            # Not acked: it comes again when the bus does.
            log.warning("job let go, the bus is away", why=str(error))
        except _DeviceLostError:  # for another worker, and counted: it may be the job's own doing
            await self._leaving.wait()  # or this worker would pull it again
            await self._nak()
        except asyncio.CancelledError:  # the drain is over
            await self._nak()
            raise
        except Exception as error:  # a record that cannot be read, a fault of ours: not its
            await self._dead_letter(error)  # neighbours' business
        finally:
            self.opened.set()
            for task in watching:
                task.cancel()
            if self._submitted:
                self._parts.engine.cancel(self.job_id)
            span.end()

    async def _dead_letter(self, error: Exception) -> None:
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

    async def _poll_cancel(self) -> None:
        """Cancels a job whose record says so: the word itself may have come while the connection
        was away."""
        job = self._delivery.job
        while True:
            await asyncio.sleep(self._parts.queue.ack_wait_seconds / 3)
            with suppress(errors.UnavailableError):
                stored = await self._parts.jobs.get(job.tenant, job.job_id)
                if stored and stored.job.cancel_requested and not self._cancelled:
                    self.cancel()

    async def _nak(self) -> None:
        """Gives the message to another worker at once, the record as it is."""
        with suppress(errors.UnavailableError, TimeoutError):
            async with asyncio.timeout(LET_GO_SECONDS):
                await self._delivery.nak()

    async def _open(self) -> JobLease | None:
        stored, writer = await asyncio.gather(
            self._parts.jobs.get(self._delivery.job.tenant, self.job_id),
            self._parts.events.open(self.job_id),
        )
        if stored is None:
            await self._delivery.term("its record has expired")
            return None
        return JobLease(self._parts, self._delivery, stored, writer)

    async def _work(self, owned: JobLease, prepared: asyncio.Task[Pixels]) -> None:
        try:
            async with background_task(owned.announce()) as announced:
                try:
                    inbox = self._submit(owned.job, await _checked_pixels(prepared))
                except errors.InitImageError:
                    await announced  # a log in which it never began would be wrong
                    raise
                await announced
            done = await self._follow(owned, inbox)
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
            await self._succeed(owned, done)

    async def _prepare(self, params: JobParams) -> Pixels:
        queued, start = self._delivery.job, time.monotonic()
        with TRACER.start_as_current_span("prepare"):
            pixels = await asyncio.to_thread(
                prepare_image,
                queued.init_image,
                width=params.width,
                height=params.height,
                prepared=queued.init_image_prepared,
            )
        self._watch.prepare = time.monotonic() - start
        return pixels

    def _submit(self, job: Job, pixels: Pixels) -> EngineEventStream:
        engine, inbox = self._parts.engine, EngineEventStream()
        engine.submit(engine_job(job, pixels, engine.model), inbox.post)
        self._submitted = True
        if self._leaving.is_set():  # asked while the image was prepared
            engine.cancel(job.id)
        return inbox

    async def _follow(self, owned: JobLease, inbox: EngineEventStream) -> JobDone:
        """Turns engine events into job events; returns when every picture is stored."""
        try:
            async with asyncio.TaskGroup() as finishing:
                while True:
                    match event := await inbox.get():
                        case SampleReady():
                            finishing.create_task(self._finish(owned, event))
                        case JobDone():
                            return event
                        case JobFailed():
                            raise event.error
                        case JobStopped():
                            raise _StoppedError
                        case DeviceLost():
                            self._parts.device_lost.set()
                            raise _DeviceLostError from event.error
                        case _:
                            if isinstance(event, StepDone):
                                self._parts.pace.step(owned.job.params)
                            await owned.tell(await to_domain_event(event))
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            inbox.close()

    async def _finish(self, owned: JobLease, ready: SampleReady) -> None:
        async for event in finish_sample(self._parts, owned.job, ready, self._watch):
            await owned.note(event)

    async def _succeed(self, owned: JobLease, done: JobDone) -> None:
        engine, job = self._parts.engine, owned.job
        owned.job = replace(
            job,
            device=engine.device,
            determinism=engine.determinism,
            timings=self._watch.added(job.timings, done.timings),
            warning=join_warnings(
                job.warning, *done.warnings, storage_warning(job, self._parts.retention_hours)
            ),
        )
        self._parts.pace.observe(job.params, done.timings.engine)
        STEPS.inc(done.timings.steps)
        await owned.end(Succeeded())


async def _checked_pixels(prepared: asyncio.Task[Pixels]) -> Pixels:
    try:
        return await prepared
    except InvalidImageError as error:
        raise errors.InitImageError(str(error)) from error


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
