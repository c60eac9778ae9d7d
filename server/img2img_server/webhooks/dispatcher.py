"""Takes webhooks out of the outbox and posts each until it is delivered or given up."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from img2img_server import clock, errors
from img2img_server.domain.job import Job
from img2img_server.interfaces.records import JobStore, UnreadableError
from img2img_server.interfaces.webhooks import PendingWebhook, WebhookOutbox
from img2img_server.outbound.policy import shown_origin
from img2img_server.telemetry import WEBHOOKS
from img2img_server.webhooks.record import FAILED, RETRYING, SUCCESS, set_status
from img2img_server.webhooks.sender import Outcome, WebhookSender
from img2img_server.webhooks.signature import Signer

DELAYS_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 21600.0)
SPREAD = 0.2
LONGEST_RETRY_AFTER_SECONDS = 3600.0
OVERFLOW_SECONDS = 5.0
LONGEST_OVERFLOW_SECONDS = 300.0
MOST_AT_ONCE = 64  # most running attempts of one api; a slow receiver occupies one of them for 30 s
MOST_OF_A_TENANT = 16  # most running attempts of one tenant at one api
# seconds that webhooks above the tenant's limit wait for one of its attempts to end
_ROOM_SECONDS = 0.05
_PULL_SECONDS = 5.0
_RETRY_SECONDS = 1.0

# Makes the body of a job's webhook, as JSON in UTF-8. Raises StorageError.
Payload = Callable[[Job], Awaitable[bytes]]

_random = secrets.SystemRandom()
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """The delays between attempts. One more attempt is made than there are delays.

    `spread`: share by which each delay is changed at random, so that webhooks that failed together
    are not sent together again. `overflow_seconds`: the first delay of a webhook above the limit of
    its tenant.
    """

    delays_seconds: tuple[float, ...] = DELAYS_SECONDS
    spread: float = SPREAD
    uniform: Callable[[float, float], float] = _random.uniform
    overflow_seconds: float = OVERFLOW_SECONDS

    def after(self, attempt: int, retry_after_seconds: float = 0.0) -> float | None:
        """Returns the seconds to wait after a failed attempt, or None after the last one.

        Args:
            attempt: The number of the attempt, from 1.
            retry_after_seconds: The delay that the receiver asked for. A longer one than ours is
                used, up to an hour.
        """
        if attempt > len(self.delays_seconds):
            return None
        delay = self._spread(self.delays_seconds[attempt - 1])
        return max(delay, min(retry_after_seconds, LONGEST_RETRY_AFTER_SECONDS))

    def overflow_delay(self, deliveries: int) -> float:
        """Returns the delay of a webhook above its tenant's limit, by the number of its deliveries
        from 1.
        """
        seconds = self.overflow_seconds * 2.0 ** min(deliveries - 1, 10)
        return self._spread(min(seconds, LONGEST_OVERFLOW_SECONDS))

    def _spread(self, seconds: float) -> float:
        return seconds * self.uniform(1 - self.spread, 1 + self.spread)


class WebhookDispatcher:
    """Delivers webhooks. Each api has one; they share the outbox."""

    def __init__(
        self,
        outbox: WebhookOutbox,
        jobs: JobStore,
        payload: Payload,
        sender: WebhookSender,
        signer: Signer,
        backoff: BackoffPolicy,
        *,
        drain_seconds: float,
    ) -> None:
        self._outbox = outbox
        self._jobs = jobs
        self._payload = payload
        self._sender = sender
        self._signer = signer
        self._backoff = backoff
        self._drain_seconds = drain_seconds
        self._attempts: dict[asyncio.Task[None], str] = {}  # the tenant of each running attempt

    async def run(self, stop: asyncio.Event) -> None:
        """Delivers until `stop` is set; running attempts then get `drain_seconds` to end.

        The outbox redelivers a webhook whose attempt was cancelled, to this or another api.
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
        while True:
            free = MOST_AT_ONCE - len(self._attempts)
            if not free:
                await asyncio.wait(self._attempts, return_when=asyncio.FIRST_COMPLETED)
                continue
            try:
                taken = await self._outbox.pull(min(free, MOST_OF_A_TENANT), _PULL_SECONDS)
                await self._defer(await self._start(tasks, taken))
            except errors.UnavailableError:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _start(
        self, tasks: asyncio.TaskGroup, waiting: list[PendingWebhook]
    ) -> list[PendingWebhook]:
        """Begins attempts. Returns the webhooks whose tenants have reached their limit.

        Waits a moment for attempts to end, so that a tenant whose receiver is quick is not
        deferred.
        """
        ends_at = time.monotonic() + _ROOM_SECONDS
        while True:
            waiting = [each for each in waiting if not self._begin(tasks, each)]
            seconds = ends_at - time.monotonic()
            if not waiting or seconds <= 0:
                return waiting
            await asyncio.wait(self._attempts, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def _begin(self, tasks: asyncio.TaskGroup, pending: PendingWebhook) -> bool:
        """Begins an attempt if the tenant's limit allows one more. Returns whether it did."""
        tenant = pending.job.tenant
        if list(self._attempts.values()).count(tenant) >= MOST_OF_A_TENANT:
            return False
        attempt = tasks.create_task(self._deliver(pending))
        self._attempts[attempt] = tenant
        attempt.add_done_callback(self._attempts.pop)
        return True

    async def _defer(self, surplus: list[PendingWebhook]) -> None:
        delay = self._backoff.overflow_delay
        await asyncio.gather(*(each.retry(delay(each.deliveries)) for each in surplus))

    async def _deliver(self, pending: PendingWebhook) -> None:
        try:
            await self._attempt(pending)
        except errors.UnavailableError:
            log.warning("nats_unavailable_webhook_will_be_redelivered", job=pending.job.id)
        except Exception as error:
            log.error("webhook_will_be_redelivered", job=pending.job.id, exc_info=error)

    async def _attempt(self, pending: PendingWebhook) -> None:
        """Makes one attempt and writes its status into the job's record.

        The record counts attempts, since the outbox counts deferrals, too. Without a record that
        can be read, each delivery counts as an attempt.
        """
        job, stored = pending.job, None
        with suppress(UnreadableError):
            stored = await self._jobs.get(job.tenant, job.id)
        attempt = pending.deliveries
        if stored is not None:
            attempt = stored.job.webhook_attempts - job.webhook_attempts + 1
        outcome = await self._post(job)
        delay = None
        if not (outcome.delivered or outcome.final):
            delay = self._backoff.after(attempt, outcome.retry_after_seconds)
        status = SUCCESS if outcome.delivered else FAILED if delay is None else RETRYING
        WEBHOOKS.labels(status).inc()
        log.info(
            "webhook",
            job=job.id,
            status=status,
            attempt=attempt,
            url=shown_origin(job.params.webhook),
            reason=outcome.detail or outcome.reason,
        )
        if stored is not None:
            error = "" if outcome.delivered else outcome.reason
            await set_status(self._jobs, job, status, error, job.webhook_attempts + attempt)
        if delay is None:
            await pending.done()
        else:
            await pending.retry(delay)

    async def _post(self, job: Job) -> Outcome:
        try:
            body = await self._payload(job)
            headers = self._signer.headers(job.id, int(clock.now()), body, job.tenant)
            return await self._sender(job.params.webhook, body, headers)
        except errors.StorageError as error:
            return Outcome(delivered=False, reason=str(error))
        except Exception as error:
            log.error("webhook_attempt_failed", job=job.id, exc_info=error)
            return Outcome(delivered=False, reason="an internal error of the service")
