"""Creates jobs from requests: admits them, creates the records and queues the jobs."""

from __future__ import annotations

import hashlib
import uuid
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img.v1 import job_pb2
from img2img_server import clock, errors
from img2img_server.api.admission import Admission, Admitted, Caller
from img2img_server.api.deps import ApiDeps
from img2img_server.api.estimate import Backlog
from img2img_server.api.records import known
from img2img_server.domain.events import Queued
from img2img_server.domain.job import Job, State, Timings
from img2img_server.domain.violations import Reason, Violation
from img2img_server.domain.warnings import join_warnings
from img2img_server.interfaces.queue import OwnershipLostError, QueuedJob
from img2img_server.interfaces.records import ConflictError, Stored
from img2img_server.storage.vault import SealBrokenError
from img2img_server.tasks import background_task
from img2img_server.telemetry import JOBS_CREATED
from img2img_server.tracing import injected

log = structlog.get_logger()

CREATING = "The job of this request_id is being created; try again."
SEALED = "Your S3 details cannot be read at the moment; this service keeps the files."


class Intake:
    """Creates jobs."""

    def __init__(self, deps: ApiDeps, admission: Admission, backlog: Backlog) -> None:
        self._settings = deps.settings
        self._jobs = deps.jobs
        self._queue = deps.bus.queue
        self._events = deps.bus.events
        self._storage = deps.bus.storage
        self._admission = admission
        self._backlog = backlog

    async def create(self, spec: job_pb2.JobSpec, request_id: str, caller: Caller) -> Stored:
        """Creates a job, or returns the job of an earlier request with the same request_id.

        Raises:
            InvalidRequestError, PermissionDeniedError, ModelNotFoundError, RequestIdReusedError,
            QueueFullError, RateLimitedError, DeadlineTooShortError, UnavailableError.
        """
        if not request_id:
            accepted = await self._admission.admit(spec, caller)
            return await self._enqueue(await self._record(accepted, caller), accepted)
        tenant, request_id, fingerprint = caller.principal.tenant, _uuid(request_id), _digest(spec)
        # Before any check: a repeated request gets its job even when the queue is full.
        bound = await self._jobs.find_request(tenant, request_id)
        job: Job | None = None
        if bound is None:
            accepted = await self._admission.admit(spec, caller)
            job = await self._record(accepted, caller)
            bound = await self._jobs.claim_request(tenant, request_id, fingerprint, job.id)
        if bound[0] != fingerprint:
            raise errors.RequestIdReusedError(request_id)
        if job is None or bound[1] != job.id:
            return await self._existing(tenant, bound[1], spec, caller)
        try:
            return await self._enqueue(job, accepted)
        except errors.ServiceError:
            with suppress(errors.ServiceError):
                await self._jobs.release_request(tenant, request_id)
            raise

    async def _existing(
        self, tenant: str, job_id: int, spec: job_pb2.JobSpec, caller: Caller
    ) -> Stored:
        stored = await known(self._jobs, tenant, job_id)
        if stored is not None and not _is_stranded(stored.job):
            return stored
        # The api that handled the first call has died before the job was queued, or is queueing it
        # now. A second message does no harm.
        accepted = await self._admission.admit(spec, caller)
        job = await self._record(accepted, caller, job_id)
        return await self._enqueue(job, accepted, begun=True)

    async def _enqueue(self, job: Job, accepted: Admitted, *, begun: bool = False) -> Stored:
        """Creates the record, appends the first event and queues the job.

        `begun`: an earlier call may have done a part of this work.
        """
        created = True
        try:
            revision = await self._jobs.create(job)
        except ConflictError:
            created = False
            stored = await known(self._jobs, job.tenant, job.id)
            if stored is None or not _is_stranded(stored.job):
                raise errors.UnavailableError(CREATING) from None
            job, revision = stored.job, stored.revision
        try:
            writer = await self._events.open(job.id, fresh=created and not begun)
            if not writer.sequence:
                queued = Queued(position=accepted.position, eta_seconds=accepted.eta_seconds)
                await writer.append(queued)
            place = await self._queue.put(
                QueuedJob(
                    job_id=job.id,
                    tenant=job.tenant,
                    init_image=accepted.image.data,
                    init_image_prepared=accepted.image.prepared,
                    trace=injected(),
                ),
                job.params.model,
                job.params.lane,
            )
        except OwnershipLostError:  # A repeated call with the same request_id was faster.
            raise errors.UnavailableError(CREATING) from None
        except Exception:
            # Without a queued message the job would never end, so its record is removed.
            with suppress(errors.ServiceError):
                await self._jobs.delete(job.tenant, job.id)
            raise
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
        job = replace(job, queue_sequence=place, last_event=writer.sequence)
        # A worker has started the job, so its place in the queue no longer matters.
        with suppress(ConflictError):
            revision = await self._jobs.update(job, revision)
        return Stored(job, revision)

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


def _is_stranded(job: Job) -> bool:
    """Returns True if the job has a record which says that the job was never queued."""
    return job.state is State.QUEUED and not (job.queue_sequence or job.attempt)


def _digest(spec: job_pb2.JobSpec) -> str:
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()


def _uuid(request_id: str) -> str:
    try:
        return str(uuid.UUID(request_id))
    except ValueError:
        violation = Violation("request_id", Reason.INVALID_FORMAT, "request_id must be a UUID")
        raise errors.InvalidRequestError([violation]) from None
