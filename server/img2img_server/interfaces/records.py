"""The seams to what is kept: job records and worker announcements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from img2img_server.domain.job import LAST_JOB_ID, Job
from img2img_server.domain.models import ModelInfo, WorkerInfo


class ConflictError(Exception):
    """The record was changed since it was read."""


class UnreadableError(Exception):
    """The record is not what it should be: a stranger's, or of a version too far away."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A record and the revision to compare and swap with."""

    job: Job
    revision: int


class JobStore(Protocol):
    """Job records by tenant and id. One whose job ended longer ago than the retention is none.

    Those that never end expire as well, some time after their last change.
    """

    async def next_id(self, tenant: str) -> int:
        """Draws a job id of the tenant: growing, never used twice. Raises UnavailableError."""
        ...

    async def create(self, job: Job) -> int:
        """Stores a new record, returns its revision. Raises ConflictError, UnavailableError."""
        ...

    async def get(self, tenant: str, job_id: int) -> Stored | None:
        """The record, or None when there is none (any more).

        Raises:
            UnreadableError, UnavailableError.
        """
        ...

    async def update(self, job: Job, revision: int) -> int:
        """Replaces the record read at `revision`. Raises ConflictError, UnavailableError."""
        ...

    async def delete(self, tenant: str, job_id: int) -> None:
        """Removes a record; for jobs that never reached the queue."""
        ...

    async def list_ids(
        self, tenant: str, before: int = LAST_JOB_ID + 1, most: int = 100
    ) -> list[int]:
        """Returns up to `most` ids that the tenant drew below `before`, newest first.

        An id may have no record, or none any more. The cost grows with `most`, and hardly with the
        number of the tenant's jobs. Raises UnavailableError.
        """
        ...

    async def find_request(self, tenant: str, request_id: str) -> tuple[str, int] | None:
        """Fingerprint and job id that an idempotency key is bound to; None when it is free."""
        ...

    async def claim_request(
        self, tenant: str, request_id: str, fingerprint: str, job_id: int
    ) -> tuple[str, int]:
        """Binds an idempotency key to a job, or tells to which it is bound.

        Returns:
            The fingerprint and job id now stored: the ones given when the claim is won.
        """
        ...

    async def release_request(self, tenant: str, request_id: str) -> None:
        """Frees an idempotency key; for jobs that never reached the queue."""
        ...


class WorkerRegistry(Protocol):
    """Announcements of workers and of the models they serve or served."""

    async def announce(self, worker: WorkerInfo) -> None:
        """Says that the worker lives; forgotten `ttl_seconds` after the last time."""
        ...

    async def withdraw(self, name: str) -> None:
        """Says that the worker stops."""
        ...

    async def workers(self) -> list[WorkerInfo]:
        """Live workers, by name."""
        ...

    async def models(self) -> list[ModelInfo]:
        """Every model ever announced, also while none serves it, by name."""
        ...

    async def model(self, name: str) -> ModelInfo | None:
        """One model, or None when no worker ever announced it."""
        ...
