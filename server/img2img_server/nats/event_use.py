"""Accounts for the bytes of ended event logs by tenant, and removes old logs.

Each ended log has an entry in the stream EVENT_USE, under the subject of its tenant. The entry has
the sum of the bytes of all logs of the tenant so far, so the bytes in use are the sum of the newest
entry without that of the oldest one. No process keeps these numbers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Final

import nats.js.errors

from img2img_server import clock
from img2img_server.errors import UnavailableError
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.direct import DirectReader
from img2img_server.nats.faults import WrongLastSequenceError

_TRIES: Final = 20
_PAUSE_SECONDS: Final = 0.05
_PAGE_ENTRIES: Final = 100
_PAGE_BYTES: Final = 64 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedLog:
    """The entry of an ended log.

    Attributes:
        size: Bytes of its events.
        total: Bytes of this log and of all logs of the tenant that ended before.
        time: Unix seconds of its end.
    """

    job_id: int
    size: int
    total: int
    time: float


class EventUse:
    """Removes ended logs: after their retention, and earlier when their tenant uses its share.

    The logs of a tenant may use as many bytes as are free. So one tenant gets half of the stream,
    two get a third each, and a tenant that stores events never removes those of another one. The
    log that ended last and logs of jobs that have not ended are never removed.
    """

    def __init__(self, link: NatsConnection, *, retention_seconds: float, max_bytes: int) -> None:
        self._link = link
        self._reader = DirectReader(link, subjects.EVENT_USE)
        self._retention_seconds = retention_seconds
        self._max_bytes = max_bytes
        link.interrupt_at_reconnect(self._reader)

    async def add(self, tenant: str, job_id: int, size: int) -> None:
        """Accounts for an ended log and removes older ones of the tenant beyond its share.

        If NATS cannot be used, the log is not accounted for, and the limits of the stream apply.
        """
        try:
            await self._trim(tenant, await self._append(tenant, job_id, size))
        except (UnavailableError, nats.js.errors.APIError) as error:
            log.warning("event_use_not_updated: job %d: %s", job_id, error)

    async def _append(self, tenant: str, job_id: int, size: int) -> EndedLog:
        """Stores the entry of a log. Several writers of a tenant may do so at a time."""
        subject = subjects.event_use_subject(tenant)
        for _ in range(_TRIES):
            last = await self._link.last(subjects.EVENT_USE, subject)
            before = codec.decode(last.data or b"", EndedLog).total if last else 0
            entry = EndedLog(job_id=job_id, size=size, total=before + size, time=clock.now())
            try:
                await self._link.replace(
                    subjects.EVENT_USE, subject, codec.encode(entry), (last.seq or 0) if last else 0
                )
            except WrongLastSequenceError:
                await asyncio.sleep(random.random() * _PAUSE_SECONDS)  # noqa: S311 - spreads load
            else:
                return entry
        raise UnavailableError(detail=f"the event logs of {tenant} end too fast to be counted")

    async def _trim(self, tenant: str, newest: EndedLog) -> None:
        """Removes the oldest logs of the tenant until the rest fits into its share."""
        subject, start, free = subjects.event_use_subject(tenant), 1, None
        while True:
            page = await self._reader.page(
                subject, start, most=_PAGE_ENTRIES, most_bytes=_PAGE_BYTES
            )
            for message in page.messages:
                entry = codec.decode(message.data, EndedLog)
                used = newest.total - entry.total + entry.size
                if free is None:
                    state = (await self._link.ask(self._events_info)).state
                    free = self._max_bytes - state.bytes
                if used <= free or entry.job_id == newest.job_id:
                    return
                await self._remove(entry.job_id)
                await self._link.delete(subjects.EVENT_USE, message.position)
                free += entry.size
                start = message.position + 1
            if page.is_last:
                return

    async def remove_expired(self) -> None:
        """Removes logs whose jobs ended before the retention. Any number of processes may do so.

        Raises:
            UnavailableError: Some may be removed.
        """
        expired_at, start = clock.now() - self._retention_seconds, 1
        while True:
            page = await self._reader.page(
                subjects.EVENT_USE_SUBJECT, start, most=_PAGE_ENTRIES, most_bytes=_PAGE_BYTES
            )
            for message in page.messages:
                entry = codec.decode(message.data, EndedLog)
                if entry.time > expired_at:
                    return
                await self._remove(entry.job_id)
                await self._link.delete(subjects.EVENT_USE, message.position)
                start = message.position + 1
            if page.is_last:
                return

    async def _events_info(self) -> nats.js.api.StreamInfo:
        return await self._link.js.stream_info(subjects.EVENTS)

    async def _remove(self, job_id: int) -> None:
        subject = subjects.events_filter(job_id)
        await self._link.ask(lambda: self._link.js.purge_stream(subjects.EVENTS, subject=subject))
