"""Job records and idempotency keys in key-value buckets."""

from __future__ import annotations

import hashlib
import time

from img2img_server.domain.job import FIRST_JOB_ID, Job
from img2img_server.interfaces.records import ConflictError, Stored, UnreadableError
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket


class KvJobStore:
    """A JobStore on JetStream. Every method raises UnavailableError when the bus is down.

    Records lie under `<tenant>.<id>`, idempotency keys under `<tenant>.<SHA-256 of the key>`.
    Every write prolongs what the bucket keeps (topology.py), so the end of the job decides here.
    """

    def __init__(self, link: NatsConnection, *, retention_seconds: float) -> None:
        self._retention_seconds = retention_seconds
        self._link = link
        self._records = Bucket(link, subjects.RECORDS_BUCKET)
        self._requests = Bucket(link, subjects.REQUESTS_BUCKET)

    async def next_id(self) -> int:
        # The stream counts every message it ever had, also through restarts: no number comes twice.
        drawn = await self._link.publish(subjects.IDS_SUBJECT, b"", repeatable=True)
        return FIRST_JOB_ID - 1 + drawn.seq

    async def create(self, job: Job) -> int:
        return await self._swap(job, 0)

    async def get(self, tenant: str, job_id: int) -> Stored | None:
        entry = await self._records.get(_key(tenant, job_id))
        if entry is None:
            return None
        try:
            job = codec.decode(entry.value, Job)
        except codec.UndecodableError as error:
            raise UnreadableError(f"jobs/{job_id}: {error}") from error
        if job.is_expired(self._retention_seconds, time.time()):
            return None
        return Stored(job, entry.revision)

    async def update(self, job: Job, revision: int) -> int:
        return await self._swap(job, revision)

    async def _swap(self, job: Job, revision: int) -> int:
        try:
            return await self._records.swap(_key(job.tenant, job.id), codec.encode(job), revision)
        except WrongLastSequenceError as error:
            raise ConflictError(f"{job.name} is not at revision {revision}") from error

    async def delete(self, tenant: str, job_id: int) -> None:
        await self._records.remove(_key(tenant, job_id))

    async def list_ids(self, tenant: str) -> list[int]:
        keys = await self._records.keys(f"{subjects.token(tenant)}.*")
        return sorted((int(key.rpartition(".")[2]) for key in keys), reverse=True)

    async def find_request(self, tenant: str, request_id: str) -> tuple[str, int] | None:
        entry = await self._requests.get(_request_key(tenant, request_id))
        return codec.decode(entry.value, tuple[str, int]) if entry else None

    async def claim_request(
        self, tenant: str, request_id: str, fingerprint: str, job_id: int
    ) -> tuple[str, int]:
        key = _request_key(tenant, request_id)
        entry = await self._requests.claim(key, codec.encode((fingerprint, job_id)))
        return codec.decode(entry.value, tuple[str, int])

    async def release_request(self, tenant: str, request_id: str) -> None:
        await self._requests.remove(_request_key(tenant, request_id))


def _key(tenant: str, job_id: int) -> str:
    return f"{subjects.token(tenant)}.{job_id}"


def _request_key(tenant: str, request_id: str) -> str:
    return f"{subjects.token(tenant)}.{hashlib.sha256(request_id.encode()).hexdigest()}"
