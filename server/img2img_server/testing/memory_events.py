"""Event logs in memory, by the rules of JetStream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from img2img_server.domain.events import TERMINAL, Envelope, Event, Preview
from img2img_server.interfaces.queue import OwnershipLostError
from img2img_server.nats.events import Envelopes
from img2img_server.testing.notifier import Notifier


@dataclass(slots=True, eq=False)
class _Log:
    entries: list[Envelope] = field(default_factory=list)
    # The number of events without previews. A writer with an older number has lost the log.
    revision: int = 0
    changes: Notifier = field(default_factory=Notifier)

    async def read(self, last_sequence: int) -> Envelope:
        """Waits for the first entry after the last sequence."""
        while True:
            changed = self.changes.wait_handle()
            for entry in self.entries:
                if entry.sequence > last_sequence:
                    return entry
            await changed.wait()


class MemoryEventLog:
    """An EventLog in memory. It keeps all events except replaced previews."""

    def __init__(self) -> None:
        self._logs: dict[int, _Log] = {}

    def _log(self, job_id: int) -> _Log:
        return self._logs.setdefault(job_id, _Log())

    async def open(
        self, job_id: int, *, tenant: str = "", fresh: bool = False
    ) -> _MemoryEventWriter:
        return _MemoryEventWriter(job_id, self._log(job_id), fresh)

    async def remove_expired(self) -> None: ...

    async def last_sequence(self, job_id: int) -> int:
        entries = self._log(job_id).entries
        return entries[-1].sequence if entries else 0

    @asynccontextmanager
    async def watch(
        self, job_id: int, after_sequence: int = 0, *, tenant: str = ""
    ) -> AsyncIterator[AsyncIterator[Envelope]]:
        yield Envelopes(self._log(job_id).read, after_sequence)


class _MemoryEventWriter:
    def __init__(self, job_id: int, log: _Log, fresh: bool) -> None:
        self._job_id = job_id
        self._log = log
        self._revision = 0 if fresh else log.revision
        known = [] if fresh else log.entries
        self._sequence = known[-1].sequence if known else 0
        logged = [entry for entry in known if not isinstance(entry.event, Preview)]
        self._previous = logged[-1].sequence if logged else 0
        self._ended = any(entry.is_terminal for entry in known)

    @property
    def sequence(self) -> int:
        return self._sequence

    @property
    def ended(self) -> bool:
        return self._ended

    def continue_after(self, number: int) -> None:
        if number > self._sequence:
            self._sequence = self._previous = number

    async def append(self, event: Event) -> Envelope:
        log = self._log
        if log.revision != self._revision:
            raise OwnershipLostError(f"job {self._job_id}: another writer has the log")
        self._sequence += 1
        entry = Envelope(
            sequence=self._sequence,
            time=time.time(),
            job_id=self._job_id,
            event=event,
            previous=self._previous,
        )
        if isinstance(event, Preview):
            log.entries = [e for e in log.entries if not _same_preview(e.event, event)]
        else:
            log.revision += 1
            self._revision += 1
            self._previous = entry.sequence
        log.entries.append(entry)
        self._ended = self._ended or isinstance(event, TERMINAL)
        log.changes.notify()
        return entry


def _same_preview(old: Event, new: Preview) -> bool:
    return isinstance(old, Preview) and old.sample == new.sample
