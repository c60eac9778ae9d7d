"""From a request to a queued job: validate, fetch, record, enqueue."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog

from img2img.v1 import job_pb2
from img2img_server import errors
from img2img_server.api import convert
from img2img_server.api.estimate import Estimator
from img2img_server.api.keys import Principal
from img2img_server.domain.events import Queued
from img2img_server.domain.job import Job, Timings
from img2img_server.domain.params import (
    SEED_MAX,
    JobParams,
    Limits,
    ValidationContext,
    Violation,
    validate,
)
from img2img_server.images.base import CheckedImage, InvalidImageError
from img2img_server.images.prepare import check_image
from img2img_server.queue.base import EventLog, JobQueue, QueuedJob
from img2img_server.settings import Settings
from img2img_server.store.base import ConflictError, JobStore, Stored, WorkerRegistry
from img2img_server.telemetry import JOBS_CREATED

log = structlog.get_logger()

# Downloads an init image. Raises InvalidImageError.
Fetch = Callable[[str], Awaitable[bytes]]
NO_REWRITER = "enhance_prompt: no rewriter is installed, the prompt was used as sent"
NO_WEBHOOKS = "webhook: this version does not deliver webhooks"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, where links shall point to and how long the answer is of use."""

    principal: Principal
    link_base: str
    remaining_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Accepted:
    params: JobParams
    image: CheckedImage
    fetch_seconds: float
    eta_seconds: float | None


class Intake:
    """Takes requests in. One for the life of the api."""

    def __init__(
        self,
        settings: Settings,
        jobs: JobStore,
        queue: JobQueue,
        events: EventLog,
        workers: WorkerRegistry,
        fetch: Fetch,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._queue = queue
        self._events = events
        self._workers = workers
        self._fetch = fetch
        self._estimator = Estimator(queue, workers)
        self.limits = image_limits(settings)

    async def create(self, spec: job_pb2.JobSpec, request_id: str, caller: Caller) -> Stored:
        """Creates the job, or returns the one that the request_id already made.

        Raises:
            InvalidRequestError, PermissionDeniedError, ModelNotFoundError, RequestIdReusedError,
            QueueFullError, DeadlineTooShortError, UnavailableError.
        """
        accepted = await self._accept(spec, caller)
        job_id = await self._jobs.next_id()
        if request_id:
            tenant = caller.principal.tenant
            fingerprint = _fingerprint(spec)
            bound, bound_id = await self._jobs.claim_request(
                tenant, _uuid(request_id), fingerprint, job_id
            )
            if bound != fingerprint:
                raise errors.RequestIdReusedError(request_id)
            if bound_id != job_id:
                return await self._existing(tenant, bound_id)
        return await self._enqueue(job_id, accepted, caller)

    async def _accept(self, spec: job_pb2.JobSpec, caller: Caller) -> _Accepted:
        request = convert.request(
            spec,
            default_model=self._settings.default_model or await self._announced_model(),
            random_seed=secrets.randbelow(SEED_MAX + 1),
        )
        params = request.params
        model = await self._workers.model(params.model)
        schedulers = model.schedulers if model else ()
        violations = request.violations + validate(
            params, ValidationContext(self.limits, schedulers)
        )
        started = time.monotonic()
        image = None
        if request.init_image:  # checked beside the fields, so that the caller hears of everything
            image = await self._check(request.init_image, params, violations)
        if violations:
            raise errors.InvalidRequestError(violations)
        if not params.safety_checker and "unsafe" not in caller.principal.permissions:
            sentence = "This key may not turn the safety checker off"
            raise errors.PermissionDeniedError("unsafe", sentence)
        if model is None:
            known = tuple(info.name for info in await self._workers.models())
            raise errors.ModelNotFoundError(params.model, known)
        image = image or await self._download(params, violations)
        if image is None:
            raise errors.InvalidRequestError(violations)
        eta = await self._estimator.new_job(params)
        remaining = caller.remaining_seconds
        if remaining is not None and eta is not None and eta > remaining:
            raise errors.DeadlineTooShortError(remaining, eta)
        params = replace(
            params,
            num_inference_steps=params.num_inference_steps or model.default_num_inference_steps,
            guidance_scale=(
                model.default_guidance_scale
                if params.guidance_scale is None
                else params.guidance_scale
            ),
            scheduler=params.scheduler or model.schedulers[0],
        )
        return _Accepted(params, image, time.monotonic() - started, eta)

    async def _announced_model(self) -> str:
        models = await self._workers.models()
        return models[0].name if models else ""

    async def _download(
        self, params: JobParams, violations: list[Violation]
    ) -> CheckedImage | None:
        try:
            data = await self._fetch(params.init_image_url)
        except InvalidImageError as error:
            violations.append(Violation("init_image", str(error)))
            return None
        return await self._check(data, params, violations)

    async def _check(
        self, data: bytes, params: JobParams, violations: list[Violation]
    ) -> CheckedImage | None:
        """The image when it is good; otherwise None and one more violation."""
        bad_size = any(violation.field in ("width", "height") for violation in violations)
        width, height = (512, 512) if bad_size else (params.width, params.height)
        try:
            return await asyncio.to_thread(
                check_image, data, width=width, height=height, limits=self.limits
            )
        except InvalidImageError as error:
            violations.append(Violation("init_image", str(error)))
            return None

    async def _existing(self, tenant: str, job_id: int) -> Stored:
        stored = await self._jobs.get(tenant, job_id)
        if stored is None:
            raise errors.UnavailableError("The first request with this request_id is under way.")
        return stored

    async def _enqueue(self, job_id: int, accepted: _Accepted, caller: Caller) -> Stored:
        params = accepted.params
        job = self._record(job_id, accepted, caller)
        revision = await self._jobs.create(job)
        try:
            writer = await self._events.open(job_id, fresh=True)
            await writer.append(Queued(eta_seconds=accepted.eta_seconds))
            place = await self._queue.put(
                QueuedJob(
                    job_id=job_id,
                    tenant=job.tenant,
                    params=params,
                    init_image=accepted.image.data,
                    init_image_prepared=accepted.image.prepared,
                )
            )
        except errors.ServiceError:
            with suppress(errors.ServiceError):
                await self._jobs.delete(job.tenant, job_id)
            raise
        JOBS_CREATED.labels(params.model, params.lane).inc()
        log.info(
            "job created",
            job=job_id,
            tenant=job.tenant,
            model=params.model,
            size=f"{params.width}x{params.height}",
            samples=params.samples,
            image_bytes=len(accepted.image.data),
        )
        job = replace(job, queue_sequence=place)
        with suppress(ConflictError):  # a worker was quicker: the place no longer matters
            revision = await self._jobs.update(job, revision)
        return Stored(job, revision)

    def _record(self, job_id: int, accepted: _Accepted, caller: Caller) -> Job:
        params = accepted.params
        warnings = [NO_REWRITER] * params.enhance_prompt + [NO_WEBHOOKS] * bool(params.webhook)
        job = Job(
            id=job_id,
            tenant=caller.principal.tenant,
            params=params,
            file_prefix=str(uuid.uuid4()),
            future_urls=(),
            create_time=time.time(),
            original_prompt=params.prompt,
            timings=Timings(fetch=accepted.fetch_seconds),
            warning="; ".join(warnings),
        )
        base = (self._settings.public_base_url or caller.link_base).rstrip("/")
        urls = tuple(f"{base}/{job.file_key(index)}" for index in range(params.samples))
        return replace(job, future_urls=urls)


def image_limits(settings: Settings) -> Limits:
    """The limits of the contract, with those of pictures as set."""
    return Limits(
        max_image_bytes=settings.max_image_bytes, max_image_pixels=settings.max_image_pixels
    )


def _fingerprint(spec: job_pb2.JobSpec) -> str:
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()


def _uuid(request_id: str) -> str:
    try:
        return str(uuid.UUID(request_id))
    except ValueError:
        violation = Violation("request_id", "request_id must be a UUID")
        raise errors.InvalidRequestError([violation]) from None
