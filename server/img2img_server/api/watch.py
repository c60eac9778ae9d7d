"""Streams the events of jobs: a snapshot, the log after a sequence, heartbeats and the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from img2img.v1 import event_pb2, job_pb2
from img2img_server import clock, errors
from img2img_server.api import convert
from img2img_server.api.deps import ApiDeps
from img2img_server.api.estimate import Estimator
from img2img_server.api.lost_workers import as_seen
from img2img_server.api.places import StreamPlaces
from img2img_server.api.records import found
from img2img_server.domain.events import Envelope
from img2img_server.domain.job import Job, terminal_event

SEQUENCE_MOST = 2**63 - 1  # int64; the greatest sequence that a caller can send
STOPPING = "This server is stopping; watch again with the last sequence seen."


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

    async def end_streams_at_stop(self) -> None:
        """Waits until the server stops, then ends every stream that waits for an event."""
        await self._stop.wait()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(0.0)

    async def heartbeats_until(self, task: asyncio.Task[Any]) -> AsyncIterator[event_pb2.JobEvent]:
        """Yields heartbeats of a stream that has no job yet, until the task is done."""
        while not task.done():
            await asyncio.wait({task}, timeout=self._heartbeat_seconds or None)
            if not task.done():
                yield convert.heartbeat(sequence=0, time=clock.now())

    async def stream(
        self, tenant: str, job_id: int, after_sequence: int, *, is_new: bool = False
    ) -> AsyncIterator[event_pb2.JobEvent]:
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
            job = await self._get(tenant, job_id)
            yield await self._snapshot(job, after_sequence)
            last = None
            if job.state.is_terminal:
                last = await self._events.last_sequence(job_id)
            seen = after_sequence
            if last is None or last > seen:
                while True:
                    envelope = await self._next(log)
                    if envelope is None:
                        yield convert.heartbeat(sequence=seen, time=clock.now(), job_name=job.name)
                        continue
                    yield await self._message(tenant, envelope, seen)
                    if envelope.is_terminal:
                        return
                    seen = envelope.sequence
                    if last is not None and seen >= last:
                        break
            # The log was removed, or its writer died before the terminal event.
            ending = Envelope(
                sequence=min(max(seen, job.last_event) + 1, SEQUENCE_MOST),
                time=job.end_time,
                job_id=job.id,
                event=terminal_event(job),
                previous=job.last_event,
            )
            yield await self._message(tenant, ending, seen)

    async def message(self, job: Job) -> job_pb2.Job:
        """Returns the Job message of a record, with its estimate."""
        job = await as_seen(job, self._workers)
        eta = await self._estimator.job(job)
        return convert.job(job, retention_hours=self._retention_hours, eta_seconds=eta)

    async def _get(self, tenant: str, job_id: int) -> Job:
        return (await found(self._jobs, tenant, job_id)).job

    async def _snapshot(self, job: Job, sequence: int) -> event_pb2.JobEvent:
        return convert.snapshot(await self.message(job), sequence=sequence, time=clock.now())

    async def _message(self, tenant: str, envelope: Envelope, seen: int) -> event_pb2.JobEvent:
        """Returns the message of an event. `seen`: the number of the event before it."""
        if envelope.is_terminal:
            job = await self._get(tenant, envelope.job_id)
            message = convert.event(envelope, await self.message(job))
        else:
            message = convert.event(envelope)
        if envelope.previous > seen:
            message.missing_from = seen + 1
        return message

    async def _next(self, log: AsyncIterator[Envelope]) -> Envelope | None:
        """Returns the next event of the log, or None when a heartbeat is due.

        It uses a timeout and no second task, because it runs for every event of every stream.

        Raises:
            UnavailableError: The server stops.
        """
        if self._stop.is_set():
            raise errors.UnavailableError(STOPPING)
        try:
            async with asyncio.timeout(self._heartbeat_seconds or None) as wait:
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
