"""Takes webhooks out of the outbox and brings them to their receivers, as often as it takes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import structlog

from img2img_server import errors
from img2img_server.domain.job import Job
from img2img_server.interfaces.records import JobStore
from img2img_server.interfaces.webhooks import PendingWebhook, WebhookOutbox
from img2img_server.outbound.policy import shown
from img2img_server.telemetry import WEBHOOKS
from img2img_server.webhooks.backoff import BackoffPolicy
from img2img_server.webhooks.record import FAILED, RETRYING, SUCCESS, set_status
from img2img_server.webhooks.sender import Outcome, WebhookSender
from img2img_server.webhooks.signature import Signer

MOST_AT_ONCE = 64  # attempts of one api; a slow receiver has one of them for 30 s
MOST_OF_A_TENANT = 16  # of these; the rest of its webhooks is put off
_CROWDED_LOOK_SECONDS = 0.05  # between two looks for webhooks of others
_PULL_SECONDS = 5.0
_RETRY_SECONDS = 1.0

# Makes the body of a job's webhook, as JSON in UTF-8. Raises StorageError.
Payload = Callable[[Job], Awaitable[bytes]]

log = structlog.get_logger()


class WebhookDispatcher:
    """One for the life of the api. Several share an outbox; each webhook is with one at a time."""

    def __init__(
        self,
        outbox: WebhookOutbox,
        jobs: JobStore,
        payload: Payload,
        post: WebhookSender,
        signer: Signer,
        pauses: BackoffPolicy,
        *,
        drain_seconds: float,
    ) -> None:
        self._outbox = outbox
        self._jobs = jobs
        self._payload = payload
        self._post = post
        self._signer = signer
        self._pauses = pauses
        self._drain_seconds = drain_seconds
        self._attempts: set[asyncio.Task[None]] = set()
        self._by_tenant: Counter[str] = Counter()

    async def run(self, stop: asyncio.Event) -> None:
        """Delivers until `stop` is set; what is under way then gets `drain_seconds` more.

        What is broken off comes again from the outbox, here or elsewhere.
        """
        async with asyncio.TaskGroup() as tasks:
            pulling = tasks.create_task(self._pull(tasks))
            await stop.wait()
            pulling.cancel()
            if self._attempts:
                await asyncio.wait(self._attempts, timeout=self._drain_seconds)
            for attempt in self._attempts:
                attempt.cancel()

    async def _pull(self, tasks: asyncio.TaskGroup) -> None:
        most = MOST_AT_ONCE
        while True:
            free = MOST_AT_ONCE - len(self._attempts)
            if not free:
                await asyncio.wait(self._attempts, return_when=asyncio.FIRST_COMPLETED)
                continue
            try:
                taken = await self._outbox.pull(min(free, most), _PULL_SECONDS)
            except errors.UnavailableError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            surplus = [pending for pending in taken if not self._start(tasks, pending)]
            # As a crowd that goes makes room, more of it may come at once.
            most = await self._put_off(surplus) if surplus else min(2 * most, MOST_AT_ONCE)

    def _start(self, tasks: asyncio.TaskGroup, pending: PendingWebhook) -> bool:
        """Begins an attempt; False when the tenant has all that it may have."""
        tenant = pending.job.tenant
        if self._by_tenant[tenant] >= MOST_OF_A_TENANT:
            return False
        attempt = tasks.create_task(self._deliver(pending))
        self._by_tenant[tenant] += 1
        self._attempts.add(attempt)

        def ended(_: asyncio.Task[None]) -> None:
            self._attempts.discard(attempt)
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]

        attempt.add_done_callback(ended)
        return True

    async def _put_off(self, surplus: list[PendingWebhook]) -> int:
        """Hands back what has no place, so that the next look finds what others have.

        Returns how many to take next: as many as places became free, or else some to look past.
        """
        pauses = [self._pauses.overflow_delay(pending.times_deferred) for pending in surplus]
        handed_back = (each.defer(pause) for each, pause in zip(surplus, pauses, strict=True))
        try:
            await asyncio.gather(*handed_back)
        except errors.UnavailableError:
            log.warning("webhooks let go, the bus is away")  # they come again
        if not self._attempts:
            return MOST_AT_ONCE
        done, _ = await asyncio.wait(
            self._attempts, timeout=_CROWDED_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        return len(done) or MOST_OF_A_TENANT

    async def _deliver(self, pending: PendingWebhook) -> None:
        job = pending.job
        outcome = await self._attempt(job)
        pause = None
        if not (outcome.delivered or outcome.final):
            pause = self._pauses.after(pending.attempt, outcome.retry_after_seconds)
        status = SUCCESS if outcome.delivered else FAILED if pause is None else RETRYING
        WEBHOOKS.labels(status).inc()
        log.info(
            "webhook",
            job=job.id,
            status=status,
            attempt=pending.attempt,
            url=shown(job.params.webhook),
            reason=outcome.detail or outcome.reason,
        )
        try:
            await self._note(job, status, "" if outcome.delivered else outcome.reason)
            if pause is None:
                await pending.done()
            else:
                await pending.retry(pause)
        except errors.UnavailableError:
            log.warning("webhook let go, the bus is away", job=job.id)  # it comes again

    async def _note(self, job: Job, status: str, error: str) -> None:
        """A record that cannot be read must hold up neither its webhook nor the service."""
        try:
            await set_status(self._jobs, job, status, error)
        except errors.UnavailableError:
            raise
        except Exception as fault:
            log.error("webhook status not written", job=job.id, exc_info=fault)

    async def _attempt(self, job: Job) -> Outcome:
        try:
            body = await self._payload(job)
            headers = self._signer.headers(job.id, int(time.time()), body)
            return await self._post(job.params.webhook, body, headers)
        except errors.StorageError as error:
            return Outcome(delivered=False, reason=str(error))
        except Exception as error:
            log.error("webhook broke", job=job.id, exc_info=error)
            return Outcome(delivered=False, reason="broke inside the service")
