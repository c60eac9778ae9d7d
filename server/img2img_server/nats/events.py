"""Numbered events on the EVENTS stream: one subject for each job, and one for each preview."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Self

from img2img_server import clock
from img2img_server.domain.events import TERMINAL, Envelope, Event, Preview
from img2img_server.interfaces.queue import OwnershipLostError
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.event_use import EventUse
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.follow import LogFollowers


class JetStreamEventLog:
    """An EventLog on JetStream."""

    def __init__(self, link: NatsConnection, use: EventUse) -> None:
        self._link = link
        self._use = use
        self._followers = LogFollowers(link)

    async def open(
        self, job_id: int, *, tenant: str = "", fresh: bool = False
    ) -> JetStreamEventWriter:
        """Opens the log of a job for writing; earlier writers lose it. Raises UnavailableError."""
        writer = JetStreamEventWriter(self._link, self._use, job_id, tenant)
        if not fresh:
            await writer.catch_up()
        return writer

    async def last_sequence(self, job_id: int) -> int:
        """Returns the number of the last event, 0 for an empty log. Raises UnavailableError."""
        last = await self._link.last(subjects.EVENTS, subjects.events_filter(job_id))
        return codec.decode_head(last.data or b"").sequence if last else 0

    async def remove_expired(self) -> None:
        await self._use.remove_expired()

    def watch(
        self, job_id: int, after_sequence: int = 0, *, tenant: str = ""
    ) -> AbstractAsyncContextManager[AsyncIterator[Envelope]]:
        return self._followers.watching(job_id, after_sequence, tenant)


class Envelopes:
    """Iterates over envelopes with rising numbers.

    Unlike a generator it can be asked again after a wait that was cancelled.

    Args:
        read: Given the last number, returns the next envelope. One with an earlier number or an
            unknown event is skipped.
    """

    def __init__(
        self, read: Callable[[int], Awaitable[Envelope | None]], after_sequence: int
    ) -> None:
        self._read = read
        self._last_sequence = after_sequence

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        while True:
            envelope = await self._read(self._last_sequence)
            if envelope is not None and envelope.sequence > self._last_sequence:
                self._last_sequence = envelope.sequence
                return envelope


class JetStreamEventWriter:
    """Appends to one log.

    The last sequence of its `.log` subject is the fence: a writer that expects another sequence has
    lost the log to a newer writer. Previews have subjects of their own and the same fence.
    """

    def __init__(self, link: NatsConnection, use: EventUse, job_id: int, tenant: str) -> None:
        self._link = link
        self._use = use
        self._job_id = job_id
        self._tenant = tenant
        self._bytes = 0  # of all events of the log, replaced previews included
        self._log_subject = subjects.log_subject(job_id)
        self.sequence = 0
        self._previous = 0  # the number of the last event that is no preview
        self._fence = 0
        self.ended = False
        self._turn = asyncio.Lock()

    async def catch_up(self) -> None:
        """Reads the last event number of the log and the stream sequence that fences writers."""
        last = await self._link.last(subjects.EVENTS, subjects.events_filter(self._job_id))
        if last is None:
            return
        head = codec.decode_head(last.data or b"")
        self.sequence = head.sequence
        self._bytes = head.log_bytes + len(last.data or b"")
        if last.subject != self._log_subject:
            last = await self._link.last(subjects.EVENTS, self._log_subject)
        if last is not None:
            head = codec.decode_head(last.data or b"")
            self._fence = last.seq or 0
            self._previous = head.sequence
            self.ended = head.is_terminal

    def continue_after(self, number: int) -> None:
        """Makes the next event have a number above `number`, also if the log was removed."""
        if number > self.sequence:
            self.sequence = self._previous = number

    async def append(self, event: Event) -> Envelope:
        """Numbers and stores the event.

        Raises:
            OwnershipLostError: Another writer has taken over.
            UnavailableError: NATS is down; the event may be stored or not.
        """
        async with self._turn:
            envelope = Envelope(
                sequence=self.sequence + 1,
                time=clock.now(),
                job_id=self._job_id,
                event=event,
                previous=self._previous,
            )
            data = codec.encode_event(envelope, self._bytes)
            if isinstance(event, Preview):
                await self._store_preview(data, event.sample)
            else:
                self._fence = await self._store(data)
                self._previous = envelope.sequence
            self.sequence = envelope.sequence
            self._bytes += len(data)
            if isinstance(event, TERMINAL) and not self.ended:
                self.ended = True
                await self._use.add(self._tenant, self._job_id, self._bytes)
            return envelope

    async def _store(self, data: bytes) -> int:
        try:
            return await self._link.replace(subjects.EVENTS, self._log_subject, data, self._fence)
        except WrongLastSequenceError as error:
            if not self._fence or await self._link.last(subjects.EVENTS, self._log_subject):
                raise self._lost() from error
            self._fence = 0  # all events of the log have expired
            return await self._store(data)

    async def _store_preview(self, data: bytes, sample: int) -> None:
        headers = {
            "Nats-Rollup": "sub",
            "Nats-Expected-Last-Subject-Sequence": str(self._fence),
            "Nats-Expected-Last-Subject-Sequence-Subject": self._log_subject,
        }
        try:
            subject = subjects.preview_subject(self._job_id, sample)
            await self._link.publish(subject, data, headers, repeatable=True)
        except WrongLastSequenceError as error:
            raise self._lost() from error

    def _lost(self) -> OwnershipLostError:
        return OwnershipLostError(f"job {self._job_id}: another writer has the log")
