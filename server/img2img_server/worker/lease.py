"""A job in its worker's hands: its record, its log and its delivery.

The record is compared-and-swapped when the job is taken and when it ends; the log is fenced. Who
loses either has lost the job to another worker and leaves it alone.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import structlog

from img2img_server import errors
from img2img_server.domain.events import Cancelled, Event, Failed, Queued, Started
from img2img_server.domain.job import (
    IllegalTransitionError,
    Job,
    State,
    advance,
    terminal_event,
)
from img2img_server.interfaces.queue import Delivery, EventWriter, OwnershipLostError
from img2img_server.interfaces.records import ConflictError, Stored
from img2img_server.telemetry import JOBS_ENDED, REDELIVERIES, STAGE_SECONDS
from img2img_server.webhooks.record import announce
from img2img_server.worker.deps import WorkerDeps

# A job may end its workers before they can write down that they have it.
DELIVERIES_OF_AN_ATTEMPT = 10

log = structlog.get_logger()

STAGES = (
    *("queue", "fetch", "prepare", "encode", "denoise", "decode", "safety", "image_encode"),
    *("upload", "engine", "total"),
)


class JobLease:
    """Every change of the job goes through here: the record, then the outbox, the log, the queue.

    Whoever crashes between leaves what the next worker needs to go on. Methods raise
    OwnershipLostError or IllegalTransitionError when another worker has the job, UnavailableError
    when the bus is down.
    """

    def __init__(
        self, parts: WorkerDeps, delivery: Delivery, stored: Stored, writer: EventWriter
    ) -> None:
        self._parts = parts
        self._writer = writer
        self._revision = stored.revision
        self._turn = asyncio.Lock()
        self.delivery = delivery
        self.job: Job = stored.job
        # Counted in the record: a delivery may also be handed on without a run.
        self._attempt = stored.job.attempt + 1

    async def take(self, *, cancelled: bool) -> bool:
        """Makes it ours, which `announce` then tells.

        False when it has ended, now or before: then there is nothing to run.
        """
        if self.job.state.is_terminal:
            await self._ensure_terminal_event()
            return False
        if cancelled or self.job.cancel_requested:
            await self.end(Cancelled())
            return False
        most, back = self._parts.max_attempts, self.job.handed_back
        deliveries = self.delivery.attempt - back
        if self._attempt - back > most or deliveries > most * DELIVERIES_OF_AN_ATTEMPT:
            await self.fail(errors.AttemptsExhaustedError(self._parts.max_attempts), dead=True)
            return False
        if self.job.state is State.RUNNING:
            REDELIVERIES.inc()
        await self._swap(self._start())
        return True

    async def announce(self) -> None:
        """Tells the log that it is ours."""
        await self.tell(self._start())

    def _start(self) -> Started:
        return Started(
            worker=self._parts.name,
            model=self._parts.engine.model.name,
            attempt=self._attempt,
        )

    async def tell(self, event: Event) -> None:
        """Appends an event that changes nothing in the record.

        A caller who is cancelled does not stop it: a writer that does not know whether its event
        was stored would find itself fenced out by its own hand.
        """
        await asyncio.shield(asyncio.ensure_future(self._append(event)))

    async def _append(self, event: Event) -> None:
        async with self._turn:
            await self._writer.append(event)

    async def note(self, event: Event) -> None:
        """Appends an event of a sample; its record is written when the job ends."""
        await self.tell(event)
        self.job = advance(self.job, event, time.time())

    async def fail(self, error: Exception, *, dead: bool = False) -> None:
        """Ends it as failed; what was not foreseen is told without its details."""
        if isinstance(error, errors.MessageTooLargeError):  # says what the operator must do
            error = errors.EngineError(str(error))
        if not isinstance(error, errors.JobFailedError):
            log.error("job broke", exc_info=error)
            error = errors.EngineError("the job broke inside the service")
        failed = Failed(reason=error.reason, message=str(error), retryable=error.retryable)
        await self.end(failed, dead_reason=error.reason if dead else None)

    async def end(self, event: Event, *, dead_reason: str | None = None) -> None:
        """Ends it; with a reason its message goes to the dead letters."""
        await self._swap(event)
        await announce(self._parts.outbox, self._parts.jobs, self.job)
        await self.tell(event)
        if dead_reason:
            await self.delivery.term(dead_reason)
        else:
            await self.delivery.ack()
        job = self.job
        JOBS_ENDED.labels(job.params.model, job.state).inc()
        for stage in STAGES if job.state is State.SUCCEEDED else ():
            STAGE_SECONDS.labels(stage).observe(getattr(job.timings, stage))
        log.info(
            "job ended",
            state=job.state,
            reason=job.failure.reason if job.failure else "",
            seconds=round(job.timings.total, 3),
            attempt=job.attempt,
        )

    async def hand_back(self) -> None:
        """Gives it to another worker; this attempt does not count."""
        await self._change(Queued(requeue_reason="worker stopped"))
        await self.delivery.nak()
        log.info("job handed back")

    async def _ensure_terminal_event(self) -> None:
        """The record has ended: says so in the log and the outbox if its writer died before it."""
        if not self._writer.ended:
            await announce(self._parts.outbox, self._parts.jobs, self.job)
            await self.tell(terminal_event(self.job))
        await self.delivery.ack()

    async def _change(self, event: Event) -> None:
        await self._swap(event)
        await self.tell(event)

    async def _swap(self, event: Event) -> None:
        """Advances the record. A cancel request may have changed it meanwhile; nothing else may."""
        while True:
            job = advance(self.job, event, time.time())
            try:
                self._revision = await self._parts.jobs.update(job, self._revision)
            except ConflictError:
                await self._reload(event)
            else:
                self.job = job
                return

    async def _reload(self, event: Event) -> None:
        stored = await self._parts.jobs.get(self.job.tenant, self.job.id)
        if stored is None or stored.job.attempt != self.job.attempt:
            raise OwnershipLostError(f"the record of job {self.job.id} moved on")
        if stored.job.state is not self.job.state:
            raise IllegalTransitionError(stored.job, event)
        self._revision = stored.revision
        self.job = replace(
            self.job,
            cancel_requested=stored.job.cancel_requested,
            queue_sequence=stored.job.queue_sequence,
        )
