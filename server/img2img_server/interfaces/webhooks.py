"""The seam to the outbox: webhooks of ended jobs that are not delivered yet."""

from __future__ import annotations

from typing import Protocol

from img2img_server.domain.job import Job


class OutboxFullError(Exception):
    """The tenant has as many undelivered webhooks as it may have."""


class PendingWebhook(Protocol):
    """One taken webhook. `done` or `retry` ends it; otherwise the outbox returns it again."""

    @property
    def job(self) -> Job:
        """The job as it ended."""
        ...

    @property
    def deliveries(self) -> int:
        """Times it was taken, from 1."""
        ...

    async def done(self) -> None:
        """Removes it: delivered, or given up."""
        ...

    async def retry(self, delay_seconds: float) -> None:
        """Makes it due again after the delay, for this or another api."""
        ...


class WebhookOutbox(Protocol):
    """Durable, at least once, in no order. Its methods raise UnavailableError."""

    async def put(self, job: Job, *, again: bool = False) -> None:
        """Stores the webhook of an ended job; a second time within ten minutes only with `again`.

        Raises:
            OutboxFullError: the tenant has too many that are not delivered.
        """
        ...

    async def pull(self, most: int, timeout_seconds: float) -> list[PendingWebhook]:
        """Takes up to `most` that are due; empty when none became due in time."""
        ...
