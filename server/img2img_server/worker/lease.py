"""A leased job: its record, its event log and its delivery.

A worker compares and swaps the record when it takes the job and when the job ends, and it fences
the log. A worker that loses either has lost the job to another worker and leaves it alone.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img_server import clock, errors
from img2img_server.domain.events import (
    Cancelled,
    Event,
    Failed,
    Queued,
    SampleFinished,
    SampleStored,
    StageFinished,
    Started,
    StorageWaiting,
    Succeeded,
)
from img2img_server.domain.job import (
    IllegalTransitionError,
    Job,
    JobFailure,
    State,
    StateReason,
    Suspended,
    Timings,
    advance,
    terminal_event,
    with_sample_errors,
)
from img2img_server.interfaces.queue import Delivery, EventWriter, OwnershipLostError
from img2img_server.interfaces.records import ConflictError, Stored
from img2img_server.interfaces.states import remove_state
from img2img_server.telemetry import JOBS_ENDED, REDELIVERIES, STAGE_SECONDS
from img2img_server.webhooks.record import announce
from img2img_server.worker.deps import WorkerDeps

# Most deliveries of one attempt: a job may break its workers before they can record an attempt.
# Workers requeue waiting jobs for idle workers, which is a delivery too.
DELIVERIES_OF_AN_ATTEMPT = 20

log = structlog.get_logger()


class JobLease:
    """Makes every change of a job in this order: record, outbox, log, queue. So if a process dies
    in between, the next worker can continue. Methods raise OwnershipLostError or
    IllegalTransitionError when another worker has the job, and UnavailableError when NATS is down.
    """

    def __init__(
        self,
        deps: WorkerDeps,
        delivery: Delivery,
        stored: Stored,
        writer: EventWriter,
        pulled_time: float,
    ) -> None:
        self._deps = deps
        self._pulled_time = pulled_time
        self._writer = writer
        self._revision = stored.revision
        self._turn = asyncio.Lock()
        self._changing = asyncio.Lock()  # One change of `job` at a time, also while it is stored.
        self.delivery = delivery
        self.job: Job = stored.job
        # The record counts attempts: a message may be delivered without a run.
        self._attempt = stored.job.attempt + 1
        self._done_steps: tuple[int, ...] = ()
        writer.continue_after(stored.job.used_number(writer.sequence))

    async def settle(self, *, cancelled: bool) -> bool:
        """Ends a job that must not run; returns whether the job has ended, before or now."""
        if self.job.state.is_terminal:
            await self._ensure_terminal_event()
            return True
        if cancelled or self.job.cancel_requested:
            await self.finish(Cancelled())
            return True
        most, back = self._deps.max_attempts, self.job.handed_back
        if self.job.suspended and self._attempt > self.job.attempt:
            back += 1  # The attempt was requeued, and its state is not used.
        too_often = self.counted_deliveries > most * DELIVERIES_OF_AN_ATTEMPT
        if self._attempt - back > most or too_often:
            await self.fail(errors.AttemptsExhaustedError(self._deps.max_attempts), dead=True)
            return True
        return False

    @property
    def counted_deliveries(self) -> int:
        """Returns the deliveries of the message without those that ended with a hand-over or were
        left to another kind of worker.
        """
        job = self.job
        handed_over = job.handed_back + job.resumes + (job.suspended is not None)
        return self.delivery.attempt - handed_over - job.uncounted_deliveries

    async def exclude_delivery(self) -> None:
        """Records that the present delivery of a suspended job does not count."""
        count = self.job.uncounted_deliveries + 1
        with suppress(ConflictError):  # The caller has cancelled the job, or a worker has taken it.
            job = replace(self.job, uncounted_deliveries=count)
            self._revision = await self._deps.jobs.update(job, self._revision)
            self.job = job

    async def take(self, *, cancelled: bool) -> bool:
        """Takes the job in its record, just before its first step; from then on the attempt counts.
        append_started adds the event.

        Returns:
            False if the job has ended before or ends now, so that there is nothing to run.
        """
        if await self.settle(cancelled=cancelled):
            return False
        if self.job.state is State.RUNNING:
            REDELIVERIES.inc()
        await self._swap(self._start())
        return True

    def resume(self, done_steps: tuple[int, ...]) -> None:
        """Makes `take` continue the present attempt instead of a new one."""
        self._attempt, self._done_steps = self.job.attempt, done_steps

    async def append_started(self) -> None:
        """Appends to the log that this worker has the job."""
        await self.append(self._start())

    def _start(self) -> Started:
        return Started(
            worker=self._deps.name,
            model=self._deps.engine.model.name,
            attempt=self._attempt,
            stored_samples=tuple(sample.index for sample in self.job.samples if sample.url),
            pulled_time=self._pulled_time,
            done_steps=self._done_steps,
        )

    async def append(self, event: Event) -> None:
        """Appends an event that changes nothing in the record.

        The append continues when the caller is cancelled: a writer that does not know whether its
        event was stored would fence itself out.
        """
        await asyncio.shield(asyncio.ensure_future(self._append(event)))

    async def _append(self, event: Event) -> None:
        async with self._turn:
            await self._writer.append(event)

    async def record_sample(self, event: StageFinished | SampleFinished | SampleStored) -> None:
        """Appends an event of a sample.

        The record gets a stored sample at once if others are missing, so that no further attempt
        generates it again. Otherwise it is written when the job ends.
        """
        if isinstance(event, StageFinished):
            await self.append(event)
            return
        if isinstance(event, SampleStored) and self._misses_another(event.sample):
            await self._swap(event)
            await self.append(event)
            return
        await self.append(event)
        async with self._changing:
            self.job = advance(self.job, event, clock.now())

    def _misses_another(self, index: int) -> bool:
        return any(not sample.url for sample in self.job.samples if sample.index != index)

    async def record_waiting(self, event: StorageWaiting) -> None:
        """Records that a file waits for the store, and appends the event."""
        if self.job.state_reason != StateReason.WAITING_FOR_STORAGE:
            await self._swap(event)
        await self.append(event)

    async def fail(self, error: Exception, *, dead: bool = False) -> None:
        """Ends the job as failed; an unexpected error is reported without its details."""
        if isinstance(error, errors.MessageTooLargeError):
            # The error's message helps the operator.
            error = errors.EngineError(str(error))
        if not isinstance(error, errors.JobFailedError):
            log.error("job_failed_unexpectedly", exc_info=error)
            error = errors.EngineError("the job failed with an internal error")
        if self.may_be_partial and any(sample.url for sample in self.job.samples):
            self.job = with_sample_errors(self.job, _failure_of(error))
            await self.finish(Succeeded())
            return
        failed = Failed(reason=error.reason, message=str(error), retryable=error.retryable)
        await self.finish(failed, dead_reason=error.reason if dead else None)

    @property
    def may_be_partial(self) -> bool:
        """Whether the job succeeds with the samples that it has if others fail."""
        params = self.job.params
        return params.allow_partial and params.samples > 1

    async def record_failure(self, sample: int, error: errors.JobFailedError) -> None:
        """Records why a sample has no file, for the end of a job that may be partial."""
        log.warning("sample_failed", sample=sample, reason=error.reason)
        async with self._changing:
            self.job = with_sample_errors(self.job, _failure_of(error), sample)

    async def finish(self, event: Event, *, dead_reason: str | None = None) -> None:
        """Ends the job; with a reason its message goes to the dead letters.

        A job whose cancel was requested before ends as cancelled, whatever `event` is.
        """
        event = await self._swap(event)
        await announce(self._deps.outbox, self._deps.jobs, self.job)
        await self.append(event)
        if dead_reason and isinstance(event, Failed):
            await self.delivery.term(dead_reason)
        else:
            await self.delivery.ack()
        job = self.job
        await remove_state(self._deps.states, job.suspended)
        JOBS_ENDED.labels(job.params.model, job.state).inc()
        if job.state is State.SUCCEEDED:
            self._deps.ledger.note(job)
            timings = job.timings
            # Quantiles of two stages cannot be added, so the whole wait is observed, too.
            waited = {"wait": timings.queue + timings.held}
            for stage, seconds in (timings.seconds | waited).items():
                STAGE_SECONDS.labels(stage, job.params.model, job.params.lane).observe(seconds)
        log.info(
            "job_ended",
            state=job.state,
            reason=job.failure.reason if job.failure else "",
            seconds=round(job.timings.total, 3),
            attempt=job.attempt,
        )

    async def hand_back(
        self, reason: str, suspended: Suspended | None = None, timings: Timings | None = None
    ) -> None:
        """Gives the job to another worker. This attempt does not count, or continues there.

        Args:
            suspended: The state from which the attempt continues.
            timings: The times of the attempt until now.
        """
        if suspended:
            times = timings or self.job.timings
            self.job = replace(self.job, suspended=suspended, timings=times)
        requeued = Queued(requeue_reason=reason)
        try:
            await self._swap(requeued)
        except IllegalTransitionError as error:
            if error.job.state.is_terminal:  # It was cancelled while its state was stored.
                await remove_state(self._deps.states, suspended)
            raise
        await self.append(requeued)
        await self.delivery.nak()
        log.info("job_handed_back", with_state=suspended is not None)

    async def _ensure_terminal_event(self) -> None:
        """Appends the terminal event of an ended record to outbox and log, if its writer died
        before it could.
        """
        if not self._writer.ended:
            await announce(self._deps.outbox, self._deps.jobs, self.job)
            await self.append(terminal_event(self.job))
        await self.delivery.ack()
        await remove_state(self._deps.states, self.job.suspended)

    async def _swap(self, event: Event) -> Event:
        """Advances the record. Only a cancel request may have changed the record meanwhile.

        Returns:
            The event that the record has: Cancelled instead of another end after a cancel request.
        """
        async with self._changing:
            return await self._swap_alone(event)

    async def _swap_alone(self, event: Event) -> Event:
        while True:
            if self.job.cancel_requested and isinstance(event, Succeeded | Failed):
                event = Cancelled()
            job = replace(advance(self.job, event, clock.now()), last_event=self._writer.sequence)
            try:
                self._revision = await self._deps.jobs.update(job, self._revision)
            except ConflictError:
                await self._reload(event)
            else:
                self.job = job
                return event

    async def _reload(self, event: Event) -> None:
        stored = await self._deps.jobs.get(self.job.tenant, self.job.id)
        if stored is None or _holder(stored.job) != _holder(self.job):
            raise OwnershipLostError(f"another worker changed the record of job {self.job.id}")
        if stored.job.state is not self.job.state:
            raise IllegalTransitionError(stored.job, event)
        self._revision = stored.revision
        self.job = replace(
            self.job,
            cancel_requested=stored.job.cancel_requested,
            queue_sequence=stored.job.queue_sequence,
        )


def _failure_of(error: errors.JobFailedError) -> JobFailure:
    return JobFailure(reason=error.reason, message=str(error), retryable=error.retryable)


def _holder(job: Job) -> tuple[int, int]:
    """Returns numbers that differ between the workers that have the job one after the other."""
    return job.attempt, job.resumes


def counted_attempts(job: Job) -> int:
    """Returns the attempts at a job that began a step, without those of stopping workers."""
    return job.attempt - job.handed_back - (job.suspended is not None)
