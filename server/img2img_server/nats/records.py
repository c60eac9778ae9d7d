"""Job records and idempotency keys in key-value buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Final

from img2img_server import clock
from img2img_server.domain.job import FIRST_JOB_ID, LAST_JOB_ID, Job
from img2img_server.interfaces.records import ConflictError, Stored, UnreadableError
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket

_WINDOW_GROWTH: Final = 4


class KvJobStore:
    """A JobStore on JetStream. Every method raises UnavailableError when NATS is down.

    Records have the keys `<tenant>.<id>`, idempotency keys `<tenant>.<SHA-256 of the key>`. The
    stream that numbers jobs has an empty message for each job, by tenant: lists are read from it.
    Each write restarts the bucket's retention (topology.py), so `get` checks the job's end itself.
    """

    def __init__(self, link: NatsConnection, *, retention_seconds: float) -> None:
        self._retention_seconds = retention_seconds
        self._link = link
        self._records = Bucket(link, subjects.RECORDS_BUCKET)
        self._requests = Bucket(link, subjects.REQUESTS_BUCKET)

    async def next_id(self, tenant: str) -> int:
        # The sequence of a stream never repeats, also after restarts.
        drawn = await self._link.publish(subjects.ids_subject(tenant), b"", repeatable=True)
        return FIRST_JOB_ID - 1 + drawn.seq

    async def create(self, job: Job, revision: int = 0) -> int:
        return await self._swap(job, revision)

    async def get(self, tenant: str, job_id: int) -> Stored | None:
        job, revision = await self.latest(tenant, job_id)
        if job is None or job.is_expired(self._retention_seconds, clock.now()):
            return None
        return Stored(job, revision)

    async def latest(self, tenant: str, job_id: int) -> tuple[Job | None, int]:
        value, revision = await self._records.latest(_key(tenant, job_id))
        if value is None:
            return None, revision
        try:
            return codec.decode(value, Job), revision
        except codec.UndecodableError as error:
            raise UnreadableError(f"jobs/{job_id}: {error}") from error

    async def update(self, job: Job, revision: int) -> int:
        return await self._swap(job, revision)

    async def _swap(self, job: Job, revision: int) -> int:
        try:
            return await self._records.swap(_key(job.tenant, job.id), codec.encode(job), revision)
        except WrongLastSequenceError as error:
            raise ConflictError(f"{job.name} is not at revision {revision}") from error

    async def abandon(self, tenant: str, job_id: int, revision: int) -> int:
        try:
            return await self._records.retire(_key(tenant, job_id), revision)
        except WrongLastSequenceError as error:
            raise ConflictError(f"jobs/{job_id} is not at revision {revision}") from error

    async def list_ids(
        self, tenant: str, before: int = LAST_JOB_ID + 1, most: int = 100
    ) -> list[int]:
        async def read(start: int, most: int) -> list[int]:
            subject = subjects.ids_subject(tenant)
            return await self._link.sequences(subjects.IDS, subject, start, most)

        last = await self._link.last(subjects.IDS, subjects.ids_subject(tenant))
        if last is None:
            return []
        end = min(before - FIRST_JOB_ID, last.seq or 0) + 1
        return [FIRST_JOB_ID - 1 + drawn for drawn in await newest(read, end, most)]

    async def find_request(self, tenant: str, request_id: str) -> tuple[str, int] | None:
        entry = await self._requests.get(_request_key(tenant, request_id))
        return codec.decode(entry.value, tuple[str, int]) if entry else None

    async def claim_request(
        self, tenant: str, request_id: str, fingerprint: str, job_id: int
    ) -> tuple[str, int]:
        key = _request_key(tenant, request_id)
        entry = await self._requests.claim(key, codec.encode((fingerprint, job_id)))
        return codec.decode(entry.value, tuple[str, int])


async def newest(
    read: Callable[[int, int], Awaitable[list[int]]], before: int, most: int
) -> list[int]:
    """Returns up to `most` numbers below `before`, highest first. A stream can only be read
    upwards.

    Reads windows below `before`, whose size grows and then shrinks until it holds about as many
    numbers as one read returns. This takes about log2(`before`) reads.

    Args:
        read: Returns the first numbers from a start on, ascending: `read(start, most)`.
    """
    found: list[int] = []
    width, growth = most, _WINDOW_GROWTH
    while before > 1 and len(found) < most:
        start = max(1, before - width)
        numbers = [number for number in await read(start, most) if number < before]
        if len(numbers) == most and before - start > most:
            # The window may have more numbers than one read returns.
            width, growth = max(most, width // _WINDOW_GROWTH), 1
            continue
        found += reversed(numbers)
        before, width = start, width * growth
    return found[:most]


def _key(tenant: str, job_id: int) -> str:
    return f"{subjects.token(tenant)}.{job_id}"


def _request_key(tenant: str, request_id: str) -> str:
    return f"{subjects.token(tenant)}.{hashlib.sha256(request_id.encode()).hexdigest()}"
