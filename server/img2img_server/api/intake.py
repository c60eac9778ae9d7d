"""Creates jobs from requests: admits them, creates the records and queues the jobs."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog

from img2img.v1 import job_pb2
from img2img_server import clock, errors, idempotency
from img2img_server.api.admission import Admission, Admitted, Caller
from img2img_server.api.deps import ApiDeps
from img2img_server.api.estimate import Backlog
from img2img_server.api.quota import Quota
from img2img_server.api.records import unreadable
from img2img_server.domain.events import Queued
from img2img_server.domain.job import Job, Timings
from img2img_server.domain.violations import Reason, Violation
from img2img_server.domain.warnings import join_warnings
from img2img_server.interfaces.queue import OwnershipLostError, QueuedJob
from img2img_server.interfaces.records import ConflictError, Stored, UnreadableError
from img2img_server.storage.vault import SealBrokenError
from img2img_server.tasks import background_task
from img2img_server.telemetry import JOBS_CREATED
from img2img_server.tracing import injected

log = structlog.get_logger()

CREATING = "The job of this request_id is being created; try again."
_TRIES: Final = 5
_ABANDON_SECONDS: Final = 3.0  # longest time to remove the record of a job that was not accepted
SEALED = "Your S3 details cannot be read at the moment; this service keeps the files."


class Intake:
    """Creates jobs. Any api can repeat and finish each step of another api
    (docs/adr/0013-one-job-for-each-request-id.md).
    """

    def __init__(self, deps: ApiDeps, admission: Admission, backlog: Backlog, quota: Quota) -> None:
        self._settings = deps.settings
        self._jobs = deps.jobs
        self._queue = deps.bus.queue
        self._events = deps.bus.events
        self._storage = deps.bus.storage
        self._admission = admission
        self._backlog = backlog
        self._quota = quota

    async def create(self, spec: job_pb2.JobSpec, request_id: str, caller: Caller) -> Stored:
        """Creates a job, or returns the job of an earlier request with the same request_id.

        Raises:
            InvalidRequestError, PermissionDeniedError, ModelNotFoundError, RequestIdReusedError,
            QueueFullError, RateLimitedError, DeadlineTooShortError, UnavailableError.
        """
        if not request_id:
            return await self._create(spec, caller, 0, await self._admission.admit(spec, caller))
        tenant, request_id = caller.principal.tenant, request_uuid(request_id)
        fingerprint = caller.fingerprint or idempotency.fingerprint(spec)
        # Before any check: a repeated request gets its job even when the queue is full.
        bound = await self._jobs.find_request(tenant, request_id)
        accepted, drawn = None, 0
        if bound is None:
            accepted = await self._admission.admit(spec, caller)
            drawn = await self._jobs.next_id(tenant)
            bound = await self._jobs.claim_request(tenant, request_id, fingerprint, drawn)
        if bound[0] != fingerprint:
            raise errors.RequestIdReusedError(request_id)
        return await self._create(spec, caller, bound[1], accepted, is_new=bound[1] == drawn)

    async def _create(
        self,
        spec: job_pb2.JobSpec,
        caller: Caller,
        job_id: int,
        accepted: Admitted | None,
        *,
        is_new: bool = False,
    ) -> Stored:
        """Returns the accepted job with this id. Has it accepted unless another call has done so.

        Args:
            job_id: The id that the request_id is bound to; 0: draws one.
            accepted: The admitted request, if this call has admitted it already.
            is_new: This call has drawn the id, so the job has probably no record yet.
        """
        tenant = caller.principal.tenant
        for _ in range(_TRIES):
            job, revision = None, 0
            if job_id and not is_new:
                job, revision = await self._latest(tenant, job_id)
            if job is not None and job.is_accepted:
                return Stored(job, revision)
            if accepted is None:
                accepted = await self._admission.admit(spec, caller)
                continue  # That may have taken long, so the record is read again.
            if job is not None:  # Another call is queueing the job now, or has died before that.
                return await self._enqueue(job, revision, accepted)
            job = await self._record(accepted, caller, job_id)
            with suppress(ConflictError):  # Another call has created the record.
                return await self._begin(job, revision, accepted)
            job_id, is_new = job.id, False
        raise errors.UnavailableError(CREATING)

    async def _begin(self, job: Job, revision: int, accepted: Admitted) -> Stored:
        """Creates the record and queues the job. Leaves neither record nor permit if that fails.

        Args:
            revision: That of the abandoned record which the new one replaces.

        Raises:
            ConflictError: Another call has created or abandoned the record.
        """
        job = replace(job, permit=await self._quota.take(job.tenant, job.id))
        created = 0
        try:
            created = await self._jobs.create(job, revision)
            return await self._enqueue(job, created, accepted, fresh=not revision)
        except Exception:
            with suppress(errors.UnavailableError, UnreadableError, ConflictError, TimeoutError):
                async with asyncio.timeout(_ABANDON_SECONDS):
                    await self._abandon(job, created or revision)
            raise

    async def _abandon(self, job: Job, revision: int) -> None:
        """Abandons the record at that revision and releases its permit, unless the job is accepted.

        A message that was queued nevertheless belongs to no record, so no worker runs it.
        """
        try:
            await self._jobs.abandon(job.tenant, job.id, revision)
        except ConflictError:
            there, revision = await self._jobs.latest(job.tenant, job.id)
            if there is not None and there.permit == job.permit:
                if there.is_accepted:
                    return
                await self._jobs.abandon(job.tenant, job.id, revision)
        await self._quota.release(job.permit)

    async def _enqueue(
        self, job: Job, revision: int, accepted: Admitted, *, fresh: bool = False
    ) -> Stored:
        """Queues the job of a record, then notes in the record that the job is accepted.

        Args:
            fresh: This call has created the first record of the job.
        """
        writer = await self._events.open(job.id, tenant=job.tenant, fresh=fresh)
        if not writer.sequence:
            queued = Queued(position=accepted.position, eta_seconds=accepted.eta_seconds)
            with suppress(OwnershipLostError):  # A repeated call with the same id was faster.
                await writer.append(queued)
        message = QueuedJob(
            job_id=job.id,
            tenant=job.tenant,
            init_image=accepted.image.data,
            init_image_prepared=accepted.image.prepared,
            trace=injected(),
            permit=job.permit,
        )
        params = job.params
        place = await self._queue.put(message, params.model, params.lane, accepted.size)
        try:
            job = replace(job, queue_sequence=place, last_event=max(1, writer.sequence))
            stored, is_new = Stored(job, await self._jobs.update(job, revision)), True
        except ConflictError:
            stored = await self._overtaken(job, place)
            is_new = not stored.job.queue_sequence  # No other call has noted the job.
        if is_new:
            self._note(stored.job, place, accepted)
        return stored

    async def _overtaken(self, job: Job, place: int) -> Stored:
        """Returns the job that a worker has taken, or another call noted, before this call could
        note it.

        Raises:
            UnavailableError: The record was abandoned.
        """
        there, revision = await self._latest(job.tenant, job.id)
        if there is not None and there.is_accepted and there.permit == job.permit:
            return Stored(there, revision)
        await self._queue.remove(place)  # The message of the abandoned record.
        raise errors.UnavailableError(CREATING)

    async def _latest(self, tenant: str, job_id: int) -> tuple[Job | None, int]:
        """Returns the record, accepted or not, and its revision. Raises UnavailableError."""
        try:
            return await self._jobs.latest(tenant, job_id)
        except UnreadableError as error:
            raise unreadable(job_id, error) from error

    def _note(self, job: Job, place: int, accepted: Admitted) -> None:
        """Counts and logs an accepted job."""
        params = job.params
        self._backlog.note(params, place, accepted.pixel_steps)
        JOBS_CREATED.labels(params.model, params.lane).inc()
        log.info(
            "job_created",
            job=job.id,
            tenant=job.tenant,
            model=params.model,
            size=f"{params.width}x{params.height}",
            samples=params.samples,
            image_bytes=len(accepted.image.data),
        )

    async def _record(self, accepted: Admitted, caller: Caller, job_id: int = 0) -> Job:
        """Returns the record of a new job. Draws an id if `job_id` is 0."""
        remaining = caller.remaining_seconds
        job = Job(
            id=job_id,
            tenant=caller.principal.tenant,
            params=accepted.params,
            file_prefix=str(uuid.uuid4()),
            future_urls=(),
            create_time=clock.now(),
            original_prompt=accepted.original_prompt,
            timings=Timings(fetch=accepted.fetch_seconds),
            warning=accepted.warning,
            deadline_time=clock.now() + remaining if remaining is not None else 0.0,
        )
        addressed = self._addressed(job, caller)
        if job_id:
            return await addressed
        async with background_task(self._jobs.next_id(job.tenant)) as drawn:
            return replace(await addressed, id=await drawn)

    async def _addressed(self, job: Job, caller: Caller) -> Job:
        """Returns the job with the links that its files will get."""
        base = (self._settings.public_base_url or caller.link_base).rstrip("/")
        keys = [job.file_key(index) for index in range(job.params.samples)]
        own_urls = tuple(f"{base}/{key}" for key in keys)
        job = replace(job, future_urls=own_urls)
        if job.params.temp:
            return job
        try:
            stored = await self._storage.current(job.tenant)
        except SealBrokenError as error:
            log.error("storage_settings_unreadable", tenant=job.tenant, error=str(error))
            return replace(job, warning=join_warnings(job.warning, SEALED))
        if stored is None:
            return job
        version, details = stored
        urls = tuple(details.file_link(key.rpartition("/")[2]) for key in keys)
        return replace(job, future_urls=urls, own_urls=own_urls, storage_version=version)


def request_uuid(request_id: str) -> str:
    """Returns the request_id in its canonical form. Raises InvalidRequestError."""
    try:
        return str(uuid.UUID(request_id))
    except ValueError:
        violation = Violation("request_id", Reason.INVALID_FORMAT, "request_id must be a UUID")
        raise errors.InvalidRequestError([violation]) from None
