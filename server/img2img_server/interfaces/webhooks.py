"""The interface to the outbox: webhooks of ended jobs that are not delivered yet."""

from __future__ import annotations

from typing import Protocol

from img2img_server.domain.job import Job


class OutboxFullError(Exception):
    """The tenant has its limit of undelivered webhooks."""


class PendingWebhook(Protocol):
    """One webhook that was pulled. `done` or `retry` ends it; otherwise it is pulled again."""

    @property
    def job(self) -> Job:
        """Returns the job that ended."""
        ...

    @property
    def deliveries(self) -> int:
        """Returns how often the webhook was pulled, from 1."""
        ...

    async def done(self) -> None:
        """Removes the webhook: it was delivered, or given up."""
        ...

    async def retry(self, delay_seconds: float) -> None:
        """Makes the webhook due again after the delay, for this or another api."""
        ...


class WebhookOutbox(Protocol):
    """Durable, at least once, without order. Its methods raise UnavailableError."""

    async def put(self, job: Job, *, again: bool = False) -> None:
        """Stores the webhook of an ended job. A second `put` within ten minutes is ignored without
        `again`.

        Raises:
            OutboxFullError: the tenant has too many undelivered webhooks.
        """
        ...

    async def pull(self, most: int, timeout_seconds: float) -> list[PendingWebhook]:
        """Returns up to `most` webhooks that are due; empty if none became due in time."""
        ...
