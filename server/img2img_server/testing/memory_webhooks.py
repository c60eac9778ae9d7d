"""The webhook outbox in memory, by the rules of JetStream."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from img2img_server.domain.job import Job
from img2img_server.interfaces.webhooks import OutboxFullError, PendingWebhook
from img2img_server.testing.notifier import Notifier


@dataclass(slots=True, eq=False)
class _Entry:
    job: Job
    taken: int = 0
    due: asyncio.TimerHandle | None = None  # set while the webhook is taken or deferred


class MemoryWebhookOutbox:
    """A WebhookOutbox in memory; it never forgets a job that was put."""

    def __init__(self, *, limit: int = 10_000, ack_wait_seconds: float = 60.0) -> None:
        self._limit = limit
        self._ack_wait_seconds = ack_wait_seconds
        self._entries: list[_Entry] = []
        self._known: set[int] = set()
        self._changes = Notifier()

    async def put(self, job: Job, *, again: bool = False) -> None:
        if job.id in self._known and not again:
            return
        if sum(entry.job.tenant == job.tenant for entry in self._entries) >= self._limit:
            raise OutboxFullError(job.tenant)
        self._known.add(job.id)
        self._entries.append(_Entry(job))
        self._changes.notify()

    async def pull(self, most: int, timeout_seconds: float) -> list[PendingWebhook]:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while True:
                    changed = self._changes.wait_handle()
                    due = [entry for entry in self._entries if entry.due is None][:most]
                    if due:
                        return [self._take(entry) for entry in due]
                    await changed.wait()
        return []

    def _take(self, entry: _Entry) -> PendingWebhook:
        entry.taken += 1
        self.defer(entry, self._ack_wait_seconds)
        return _MemoryPending(self, entry)

    def defer(self, entry: _Entry, delay_seconds: float) -> None:
        """Makes the entry due after the delay."""
        if entry.due is not None:
            entry.due.cancel()
        entry.due = asyncio.get_running_loop().call_later(delay_seconds, self._set_due, entry)

    def _set_due(self, entry: _Entry) -> None:
        entry.due = None
        self._changes.notify()

    def remove(self, entry: _Entry) -> None:
        """Removes the entry, if it is still there."""
        if entry.due is not None:
            entry.due.cancel()
        if entry in self._entries:
            self._entries.remove(entry)


class _MemoryPending:
    def __init__(self, outbox: MemoryWebhookOutbox, entry: _Entry) -> None:
        self._outbox = outbox
        self._entry = entry
        self._taken = entry.taken

    @property
    def job(self) -> Job:
        return self._entry.job

    @property
    def deliveries(self) -> int:
        return self._taken

    async def done(self) -> None:
        self._outbox.remove(self._entry)

    async def retry(self, delay_seconds: float) -> None:
        if self._entry.taken == self._taken:  # Otherwise the webhook was pulled again meanwhile.
            self._outbox.defer(self._entry, delay_seconds)
