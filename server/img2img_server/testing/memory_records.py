"""Job records, the worker registry and key-value buckets in memory, by the rules of JetStream."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable
from fnmatch import fnmatchcase

from img2img_server.domain.job import FIRST_JOB_ID, LAST_JOB_ID, Job
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.interfaces.records import ConflictError, Stored
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import KvEntry


class MemoryJobStore:
    """A JobStore in memory."""

    def __init__(self, *, retention_seconds: float = 24 * 3600.0) -> None:
        self._retention_seconds = retention_seconds
        self._ids = itertools.count(FIRST_JOB_ID)
        self._drawn: dict[str, list[int]] = {}  # ids by tenant, oldest first
        self._revisions = itertools.count(1)
        self._records: dict[tuple[str, int], Stored] = {}
        self._abandoned: dict[tuple[str, int], int] = {}  # revisions of removed records
        self._requests: dict[tuple[str, str], tuple[str, int]] = {}

    async def next_id(self, tenant: str) -> int:
        job_id = next(self._ids)
        self._drawn.setdefault(tenant, []).append(job_id)
        return job_id

    async def create(self, job: Job, revision: int = 0) -> int:
        if await self.latest(job.tenant, job.id) != (None, revision):
            raise ConflictError(f"{job.name} exists or was changed since revision {revision}")
        return self._store(job)

    async def get(self, tenant: str, job_id: int) -> Stored | None:
        stored = self._records.get((tenant, job_id))
        if stored and stored.job.is_expired(self._retention_seconds, time.time()):
            return None
        return stored

    async def latest(self, tenant: str, job_id: int) -> tuple[Job | None, int]:
        key = tenant, job_id
        if stored := self._records.get(key):
            return stored.job, stored.revision
        return None, self._abandoned.get(key, 0)

    async def update(self, job: Job, revision: int) -> int:
        stored = self._records.get((job.tenant, job.id))
        if stored is None or stored.revision != revision:
            raise ConflictError(f"{job.name} was changed since revision {revision}")
        return self._store(job)

    def _store(self, job: Job) -> int:
        stored = Stored(job, next(self._revisions))
        self._records[job.tenant, job.id] = stored
        return stored.revision

    async def abandon(self, tenant: str, job_id: int, revision: int) -> int:
        if (await self.latest(tenant, job_id))[1] != revision:
            raise ConflictError(f"jobs/{job_id} was changed since revision {revision}")
        self._records.pop((tenant, job_id), None)
        abandoned = self._abandoned[tenant, job_id] = next(self._revisions)
        return abandoned

    async def list_ids(
        self, tenant: str, before: int = LAST_JOB_ID + 1, most: int = 100
    ) -> list[int]:
        drawn = self._drawn.get(tenant, [])
        end = bisect_left(drawn, before)
        return drawn[max(0, end - most) : end][::-1]

    async def find_request(self, tenant: str, request_id: str) -> tuple[str, int] | None:
        return self._requests.get((tenant, request_id))

    async def claim_request(
        self, tenant: str, request_id: str, fingerprint: str, job_id: int
    ) -> tuple[str, int]:
        return self._requests.setdefault((tenant, request_id), (fingerprint, job_id))


class MemoryWorkerRegistry:
    """A WorkerRegistry in memory. `clock`: monotonic seconds."""

    def __init__(
        self, *, ttl_seconds: float = 20.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._workers: dict[str, tuple[float, WorkerInfo]] = {}
        self._models: dict[str, ModelInfo] = {}

    async def announce(self, worker: WorkerInfo) -> None:
        self._workers[worker.name] = (self._clock() + self._ttl_seconds, worker)
        if worker.serves:
            self._models[worker.model.name] = worker.model

    async def withdraw(self, name: str) -> None:
        self._workers.pop(name, None)

    async def workers(self) -> list[WorkerInfo]:
        return [worker for worker in await self.announced() if worker.serves]

    async def announced(self) -> list[WorkerInfo]:
        alive = self._alive()
        return [alive[name] for name in sorted(alive)]

    async def names(self) -> set[str]:
        return set(self._alive())

    def _alive(self) -> dict[str, WorkerInfo]:
        now = self._clock()
        return {name: worker for name, (until, worker) in self._workers.items() if now < until}

    async def models(self) -> list[ModelInfo]:
        return [self._models[name] for name in sorted(self._models)]

    async def model(self, name: str) -> ModelInfo | None:
        return self._models.get(name)


class MemoryBucket:
    """A KeyValue bucket in memory; no value expires."""

    def __init__(self) -> None:
        self._entries: dict[str, KvEntry] = {}
        self._revisions = itertools.count(1)

    async def get(self, key: str) -> KvEntry | None:
        return self._entries.get(key)

    async def put(self, key: str, value: bytes) -> int:
        self._entries[key] = KvEntry(value, next(self._revisions))
        return self._entries[key].revision

    async def swap(self, key: str, value: bytes, revision: int) -> int:
        found = self._entries.get(key)
        if (found.revision if found else 0) != revision:
            raise WrongLastSequenceError(key)
        return await self.put(key, value)

    async def remove(self, key: str) -> None:
        self._entries.pop(key, None)

    async def keys(self, pattern: str = ">") -> list[str]:
        # A key has no characters that are special to fnmatch.
        return [key for key in self._entries if fnmatchcase(key, pattern.replace(">", "*"))]
