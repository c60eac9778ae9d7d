"""Streams the events of jobs: a snapshot, the log after a sequence, heartbeats and the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import structlog

from img2img.v1 import job_pb2
from img2img_server import clock, errors
from img2img_server.api import convert
from img2img_server.api.deps import ApiDeps
from img2img_server.api.encoded import EncodedEvents, StreamedEvent, streamed
from img2img_server.api.estimate import Estimator
from img2img_server.api.places import StreamPlaces
from img2img_server.api.records import found
from img2img_server.api.waiting_jobs import as_seen
from img2img_server.domain.events import Envelope, Started
from img2img_server.domain.job import Job, State, terminal_event

SEQUENCE_MOST = 2**63 - 1  # int64; the greatest sequence that a caller can send
# Interval in which a silent stream looks whether its job has ended, if there are no heartbeats.
LOOK_SECONDS = 15.0
REMOVAL_SECONDS = 60.0  # average interval in which expired logs are removed
STOPPING = "This server is stopping; watch again with the last sequence seen."

log = structlog.get_logger()


class Watcher:
    """Streams logs to callers, and ends the streams when the server stops.

    Streams end early only while `end_streams_at_stop` runs.
    """

    def __init__(self, deps: ApiDeps, estimator: Estimator) -> None:
        self._jobs = deps.jobs
        self._workers = deps.workers
        self._events = deps.bus.events
        self._estimator = estimator
        self._stop = deps.stop
        self.places = StreamPlaces(deps.settings.max_watchers)
        self._retention_hours = deps.settings.retention_hours
        self._heartbeat_seconds = deps.settings.heartbeat_seconds
        self._waits: set[asyncio.Timeout] = set()
        self._removal_seconds = min(REMOVAL_SECONDS, deps.settings.events_retention_seconds / 10)
        self._encoded = EncodedEvents()
        self._endings: dict[int, asyncio.Task[job_pb2.Job]] = {}

    async def end_streams_at_stop(self) -> None:
        """Waits until the server stops, then ends every stream that waits for an event."""
        await self._stop.wait()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(0.0)

    async def remove_expired_logs(self) -> None:
        """Removes the logs of jobs that ended before the retention, again and again."""
        while True:
            # Each api waits for another time, so that one of them does the work.
            await asyncio.sleep(self._removal_seconds * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                await self._events.remove_expired()
            except errors.UnavailableError as error:
                log.debug("expired_event_logs_not_removed", error=str(error))

    async def heartbeats_until(self, task: asyncio.Task[Any]) -> AsyncIterator[StreamedEvent]:
        """Yields heartbeats of a stream that has no job yet, until the task is done."""
        while not task.done():
            await asyncio.wait({task}, timeout=self._heartbeat_seconds or None)
            if not task.done():
                yield streamed(convert.heartbeat(sequence=0, time=clock.now()))

    async def stream(
        self, tenant: str, job_id: int, after_sequence: int, *, is_new: bool = False
    ) -> AsyncIterator[StreamedEvent]:
        """Yields the job's events until its terminal one, and heartbeats while there is none.

        Args:
            is_new: The caller has just created the job. Otherwise the record is read before the log
                is opened, so that a job of another tenant costs one read.

        Raises:
            JobNotFoundError; UnavailableError when the server stops.
        """
        if not is_new:
            await self._get(tenant, job_id)
        async with self._events.watch(job_id, after_sequence, tenant=tenant) as log:
            # The log is open before the record is read here, so no event between the two is missed.
            job = await self._seen(await self._get(tenant, job_id))
            # Why the job waits, as the last snapshot says; None: it has run since.
            sent: tuple[str, str] | None = (job.state_reason, job.warning)
            seen = after_sequence
            yield await self._snapshot(job, seen)
            last = await self._last(job)
            while last is None or last > seen:
                envelope = await self._next(log)
                if envelope is None:
                    job = await self._seen(await self._get(tenant, job_id), is_fresh=False)
                    last = await self._last(job)
                    why = job.state_reason, job.warning
                    differs = bool(job.state_reason) if sent is None else why != sent
                    if job.state is State.QUEUED and differs:
                        sent = why
                        yield await self._snapshot(job, seen)
                    elif self._heartbeat_seconds:
                        beat = convert.heartbeat(sequence=seen, time=clock.now(), job_name=job.name)
                        yield streamed(beat)
                    continue
                yield await self._event(tenant, envelope, seen)
                if envelope.is_terminal:
                    return
                if isinstance(envelope.event, Started):
                    sent = None
                seen = envelope.sequence
            # The log was removed, or its writer died before the terminal event.
            ending = Envelope(
                sequence=min(max(seen, job.last_event) + 1, SEQUENCE_MOST),
                time=job.end_time,
                job_id=job.id,
                event=terminal_event(job),
                previous=job.last_event,
            )
            yield await self._event(tenant, ending, seen)

    async def _last(self, job: Job) -> int | None:
        """Returns the number of the last event of a job that has ended, else None."""
        return await self._events.last_sequence(job.id) if job.state.is_terminal else None

    async def message(self, job: Job, *, is_fresh: bool = True) -> job_pb2.Job:
        """Returns the Job message of a record, with its estimate. `is_fresh`: see `as_seen`."""
        return await self._message(await self._seen(job, is_fresh=is_fresh))

    async def _message(self, job: Job) -> job_pb2.Job:
        """Returns the Job message of a job as callers see it."""
        eta = await self._estimator.job(job)
        return convert.job(job, retention_hours=self._retention_hours, eta_seconds=eta)

    async def _seen(self, job: Job, *, is_fresh: bool = True) -> Job:
        return await as_seen(job, self._workers, self._retention_hours, is_fresh=is_fresh)

    async def _get(self, tenant: str, job_id: int) -> Job:
        return (await found(self._jobs, tenant, job_id)).job

    async def _snapshot(self, job: Job, sequence: int) -> StreamedEvent:
        message = await self._message(job)
        return streamed(convert.snapshot(message, sequence=sequence, time=clock.now()))

    async def _event(self, tenant: str, envelope: Envelope, seen: int) -> StreamedEvent:
        """Encodes an event. `seen`: the number of the event before it."""
        is_missing = envelope.previous > seen
        if not envelope.is_terminal and not is_missing:
            return self._encoded.get(envelope)
        job = await self._ended(tenant, envelope.job_id) if envelope.is_terminal else None
        message = convert.event(envelope, job)
        if is_missing:
            message.missing_from = seen + 1
        return streamed(message)

    async def _ended(self, tenant: str, job_id: int) -> job_pb2.Job:
        """Returns the Job message of a terminal event. Streams that end together share it."""
        reading = self._endings.get(job_id)
        if reading is None:
            reading = asyncio.create_task(self._read_message(tenant, job_id))
            self._endings[job_id] = reading
            reading.add_done_callback(lambda _: self._endings.pop(job_id))
        return await asyncio.shield(reading)

    async def _read_message(self, tenant: str, job_id: int) -> job_pb2.Job:
        return await self.message(await self._get(tenant, job_id))

    async def _next(self, log: AsyncIterator[Envelope]) -> Envelope | None:
        """Returns the next event of the log, or None after the heartbeat interval without one.

        It uses a timeout and no second task, because it runs for every event of every stream.

        Raises:
            UnavailableError: The server stops.
        """
        if self._stop.is_set():
            raise errors.UnavailableError(STOPPING)
        try:
            async with asyncio.timeout(self._heartbeat_seconds or LOOK_SECONDS) as wait:
                self._waits.add(wait)
                try:
                    return await anext(log)
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if not wait.expired():
                raise
            if self._stop.is_set():
                raise errors.UnavailableError(STOPPING) from None
            return None
