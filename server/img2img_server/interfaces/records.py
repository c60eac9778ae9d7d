"""The interfaces to job records and worker announcements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from img2img_server.domain.job import LAST_JOB_ID, Job
from img2img_server.domain.models import ModelInfo, WorkerInfo


class ConflictError(Exception):
    """The record has changed since it was read."""


class UnreadableError(Exception):
    """The record cannot be decoded: another program or version wrote it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A record and the revision for compare-and-swap."""

    job: Job
    revision: int


class JobStore(Protocol):
    """Job records by tenant and id.

    A record expires when its job ended before the retention time; the record of a job that never
    ends expires some time after its last change.
    """

    async def next_id(self, tenant: str) -> int:
        """Draws a job id of the tenant: growing, never used twice. Raises UnavailableError."""
        ...

    async def create(self, job: Job, revision: int = 0) -> int:
        """Stores a new record and returns its revision.

        Args:
            revision: The revision at which an earlier record of the job was abandoned; 0: the job
                never had a record.

        Raises:
            ConflictError, UnavailableError.
        """
        ...

    async def get(self, tenant: str, job_id: int) -> Stored | None:
        """Returns the record, or None if there is none or it has expired.

        Raises:
            UnreadableError, UnavailableError.
        """
        ...

    async def latest(self, tenant: str, job_id: int) -> tuple[Job | None, int]:
        """Returns the record, also an expired one, and its revision.

        Without a record it returns None and the revision for `create` and `abandon`.

        Raises:
            UnreadableError, UnavailableError.
        """
        ...

    async def update(self, job: Job, revision: int) -> int:
        """Replaces the record read at `revision`. Raises ConflictError, UnavailableError."""
        ...

    async def abandon(self, tenant: str, job_id: int, revision: int) -> int:
        """Removes the record that was read at `revision`, or prevents that a call which has read
        `revision` creates one. Returns the revision for the next record.

        Raises:
            ConflictError, UnavailableError.
        """
        ...

    async def list_ids(
        self, tenant: str, before: int = LAST_JOB_ID + 1, most: int = 100
    ) -> list[int]:
        """Returns up to `most` ids that the tenant drew below `before`, newest first.

        An id may have no record. The cost grows with `most`, and hardly with the
        number of the tenant's jobs. Raises UnavailableError.
        """
        ...

    async def find_request(self, tenant: str, request_id: str) -> tuple[str, int] | None:
        """Returns the fingerprint and job id of an idempotency key; None: the key is free."""
        ...

    async def claim_request(
        self, tenant: str, request_id: str, fingerprint: str, job_id: int
    ) -> tuple[str, int]:
        """Binds an idempotency key to a job id, unless it is bound already.

        Returns:
            The fingerprint and job id that are stored now.
        """
        ...


class WorkerRegistry(Protocol):
    """Announcements of workers and of the models they serve or served."""

    async def announce(self, worker: WorkerInfo) -> None:
        """Announces a live worker; the announcement expires `ttl_seconds` later."""
        ...

    async def withdraw(self, name: str) -> None:
        """Withdraws the announcement of a worker that stops."""
        ...

    async def workers(self) -> list[WorkerInfo]:
        """Returns the live workers that take jobs, by name."""
        ...

    async def announced(self) -> list[WorkerInfo]:
        """Returns all live workers, also those that drain or could not load their model."""
        ...

    async def names(self) -> set[str]:
        """Returns the names of all live workers, also of those that drain."""
        ...

    async def models(self) -> list[ModelInfo]:
        """Returns the models that workers serve, or have served within a stated time, by name."""
        ...

    async def model(self, name: str) -> ModelInfo | None:
        """Returns a model, or None if it is not one of `models`."""
        ...
