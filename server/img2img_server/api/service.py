"""The gRPC service img2img.v1.Img2ImgService; intake, watch and cancel do the work."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

import grpc
import structlog

from img2img.v1 import service_pb2, service_pb2_grpc
from img2img_server import errors
from img2img_server.api import convert
from img2img_server.api.admin import StorageCalls
from img2img_server.api.admission import Caller
from img2img_server.api.cancel import Canceller
from img2img_server.api.convert_service import capabilities, upload
from img2img_server.api.deps import ApiDeps
from img2img_server.api.disconnects import Disconnects, GenerateCall
from img2img_server.api.dry_run import DryRun
from img2img_server.api.encoded import StreamedEvent
from img2img_server.api.intake import Intake, request_uuid
from img2img_server.api.interceptors import OpenCalls, current_principal
from img2img_server.api.receive import request_kept
from img2img_server.api.records import found, of_request, page_of
from img2img_server.api.stream_tokens import StreamTokens
from img2img_server.api.watch import Watcher
from img2img_server.budget import Budget
from img2img_server.compat.modelslab import names
from img2img_server.domain.job import FIRST_JOB_ID, LAST_JOB_ID
from img2img_server.domain.urls import is_http_url
from img2img_server.domain.violations import Reason, Violation, out_of_range
from img2img_server.interfaces.records import Stored
from img2img_server.interfaces.webhooks import OutboxFullError

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_WARNING_MOST_CHARACTERS = 2000
_FINGERPRINT_MOST_CHARACTERS = 64
_PAGE_DEFAULT, _PAGE_MOST = 20, 100

log = structlog.get_logger()


class Img2ImgServicer(service_pb2_grpc.Img2ImgServiceServicer):
    """Implements img2img.v1.Img2ImgService; service.proto documents the calls."""

    def __init__(
        self,
        deps: ApiDeps,
        intake: Intake,
        dry_run: DryRun,
        watcher: Watcher,
        canceller: Canceller,
        disconnects: Disconnects,
        tokens: StreamTokens,
    ) -> None:
        self._deps = deps
        self._intake = intake
        self._dry_run = dry_run
        self._watcher = watcher
        self._canceller = canceller
        self._disconnects = disconnects
        self._tokens = tokens
        self._storage = StorageCalls(deps)
        self._creations = OpenCalls(deps.settings.max_tenant_calls)
        # A page reads up to 100 records, so a tenant reads one at a time.
        self._listings = Budget("job lists", 4, 1, wait_seconds=5.0, most_waiting=50)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: service_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[bytes]:
        caller = self._caller(context)
        # The place is taken before there is a job that could not be streamed.
        with self._watcher.places.taken(caller.principal.tenant):
            async for event in self._generate(request, caller, context):
                yield event.data

    async def _generate(
        self, request: service_pb2.GenerateRequest, caller: Caller, context: Context
    ) -> AsyncIterator[StreamedEvent]:
        call = GenerateCall(
            disconnects=self._disconnects,
            creation=self._create(request, caller),
            detach=request.detach,
            is_repeatable=bool(request.request_id),
            remaining_seconds=caller.remaining_seconds,
        )
        del request  # The stream continues after the job has taken the init image.
        _when_done(context, call.done)
        try:
            async for event in self._create_and_watch(call):
                yield event
        except Exception:
            call.has_ended = True
            raise
        call.has_ended = True

    async def _create_and_watch(self, call: GenerateCall) -> AsyncIterator[StreamedEvent]:
        async for heartbeat in self._watcher.heartbeats_until(call.creation):
            yield heartbeat
        job = call.creation.result().job
        call.opened(job.tenant, job.id)
        async for event in self._watcher.stream(job.tenant, job.id, 0, is_new=True):
            call.sends(event.kind)
            yield event

    async def CreateJob(  # noqa: N802
        self, request: service_pb2.CreateJobRequest, context: Context
    ) -> service_pb2.CreateJobResponse:
        creation = self._create(request, self._caller(context, with_deadline=False))
        stored = await asyncio.shield(creation)
        return service_pb2.CreateJobResponse(job=await self._watcher.message(stored.job))

    async def EstimateJob(  # noqa: N802
        self, request: service_pb2.EstimateJobRequest, context: Context
    ) -> service_pb2.EstimateJobResponse:
        return await self._dry_run.estimate(request.spec, self._caller(context))

    async def GetJob(  # noqa: N802
        self, request: service_pb2.GetJobRequest, context: Context
    ) -> service_pb2.GetJobResponse:
        stored = await found(self._deps.jobs, current_principal().tenant, _job_id(request.name))
        return service_pb2.GetJobResponse(job=await self._watcher.message(stored.job))

    async def ListJobs(  # noqa: N802
        self, request: service_pb2.ListJobsRequest, context: Context
    ) -> service_pb2.ListJobsResponse:
        size, before = _page(request)
        states = convert.states(request.states)
        tenant = current_principal().tenant
        wanted = states if request.states else None
        with await self._listings.take(tenant, 1):
            if request.request_id:
                known = await of_request(self._deps.jobs, tenant, request_uuid(request.request_id))
                jobs, before = [j for j in known if wanted is None or j.state in wanted], 0
            else:
                jobs, before = await page_of(self._deps.jobs, tenant, before, size, wanted)
        return service_pb2.ListJobsResponse(
            # The workers are read again at most once for a page.
            jobs=[await self._watcher.message(job, is_fresh=not n) for n, job in enumerate(jobs)],
            next_page_token=_token(before) if before else "",
        )

    async def WatchJob(  # type: ignore[override]  # noqa: N802
        self, request: service_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[bytes]:
        if request.after_sequence < 0:
            message = "after_sequence must not be negative"
            violation = Violation("after_sequence", Reason.OUT_OF_RANGE, message)
            raise errors.InvalidRequestError([violation])
        caller, job_id = current_principal(), _job_id(request.name)
        if caller.only_job not in (None, job_id):
            raise errors.JobNotFoundError(request.name)
        tenant = caller.tenant
        with self._watcher.places.taken(tenant):
            events = self._watcher.stream(tenant, job_id, request.after_sequence)
            snapshot = await anext(events)  # Raises unless the job belongs to this tenant.
            if caller.only_job is None:  # A token only reads: it does not keep a job alive.
                self._disconnects.opened(tenant, job_id)
                _when_done(context, lambda: self._disconnects.closed(job_id))
            yield snapshot.data
            async for event in events:
                yield event.data

    async def CreateStreamToken(  # noqa: N802
        self, request: service_pb2.CreateStreamTokenRequest, context: Context
    ) -> service_pb2.CreateStreamTokenResponse:
        caller, job_id = current_principal(), _job_id(request.name)
        await found(self._deps.jobs, caller.tenant, job_id)
        token, end = self._tokens.make(caller, job_id)
        return service_pb2.CreateStreamTokenResponse(
            token=token, expire_time=convert.timestamp(end)
        )

    async def CancelJob(  # noqa: N802
        self, request: service_pb2.CancelJobRequest, context: Context
    ) -> service_pb2.CancelJobResponse:
        cancelling = self._canceller.cancel(current_principal().tenant, _job_id(request.name))
        job = await asyncio.shield(self._spawn(cancelling))
        return service_pb2.CancelJobResponse(job=await self._watcher.message(job))

    async def RedeliverWebhook(  # noqa: N802
        self, request: service_pb2.RedeliverWebhookRequest, context: Context
    ) -> service_pb2.RedeliverWebhookResponse:
        stored = await found(self._deps.jobs, current_principal().tenant, _job_id(request.name))
        job = stored.job
        if not job.state.is_terminal:
            raise errors.JobNotEndedError(job.name, job.state)
        if not job.params.webhook:
            raise errors.NoWebhookError(job.name)
        try:
            await self._deps.bus.outbox.put(job, again=True)
        except OutboxFullError as error:
            raise errors.TooManyWebhooksError from error
        return service_pb2.RedeliverWebhookResponse(job=await self._watcher.message(job))

    async def CreateUpload(  # noqa: N802
        self, request: service_pb2.CreateUploadRequest, context: Context
    ) -> service_pb2.CreateUploadResponse:
        tenant, uploads = current_principal().tenant, self._deps.uploads
        if request.image:
            stored = await uploads.create(tenant, request.image, request.sha256, request.size_bytes)
            return service_pb2.CreateUploadResponse(upload=upload(stored))
        found, url, end = await uploads.announce(tenant, request.sha256, request.size_bytes)
        response = service_pb2.CreateUploadResponse(upload=upload(found), put_url=url)
        if url:
            response.put_expire_time.CopyFrom(convert.timestamp(end))
        return response

    async def CompleteUpload(  # noqa: N802
        self, request: service_pb2.CompleteUploadRequest, context: Context
    ) -> service_pb2.CompleteUploadResponse:
        found = await self._deps.uploads.complete(current_principal().tenant, request.name)
        return service_pb2.CompleteUploadResponse(upload=upload(found))

    async def GetUpload(  # noqa: N802
        self, request: service_pb2.GetUploadRequest, context: Context
    ) -> service_pb2.GetUploadResponse:
        found = await self._deps.uploads.get(current_principal().tenant, request.name)
        return service_pb2.GetUploadResponse(upload=upload(found))

    async def DeleteUpload(  # noqa: N802
        self, request: service_pb2.DeleteUploadRequest, context: Context
    ) -> service_pb2.DeleteUploadResponse:
        await self._deps.uploads.delete(current_principal().tenant, request.name)
        return service_pb2.DeleteUploadResponse()

    async def GetCapabilities(  # noqa: N802
        self, request: service_pb2.GetCapabilitiesRequest, context: Context
    ) -> service_pb2.GetCapabilitiesResponse:
        registry = self._deps.workers
        models, workers = await registry.models(), await registry.announced()
        return capabilities(self._deps.settings, self._deps.limits, models, workers)

    async def GetCaller(  # noqa: N802
        self, request: service_pb2.GetCallerRequest, context: Context
    ) -> service_pb2.GetCallerResponse:
        caller = current_principal()
        return service_pb2.GetCallerResponse(
            tenant=caller.tenant,
            key_id=caller.key_id,
            permissions=sorted(caller.permissions),
            label=caller.label,
            expire_time=convert.optional_time(caller.expire_time),
        )

    async def UpdateStorageSettings(  # noqa: N802
        self, request: service_pb2.UpdateStorageSettingsRequest, context: Context
    ) -> service_pb2.UpdateStorageSettingsResponse:
        return await self._storage.update(current_principal(), request)

    async def ResetStorageSettings(  # noqa: N802
        self, request: service_pb2.ResetStorageSettingsRequest, context: Context
    ) -> service_pb2.ResetStorageSettingsResponse:
        return await self._storage.reset(current_principal(), request)

    def _create(
        self,
        request: service_pb2.GenerateRequest | service_pb2.CreateJobRequest,
        caller: Caller,
    ) -> asyncio.Task[Stored]:
        """Begins to create the job. The end of the call does not stop it."""
        return self._spawn(self._create_counted(request, caller))

    async def _create_counted(
        self,
        request: service_pb2.GenerateRequest | service_pb2.CreateJobRequest,
        caller: Caller,
    ) -> Stored:
        # The creation counts as one more open call: it holds the image after the call has ended.
        with self._creations.counted("CreateJob", caller.principal.tenant), request_kept():
            return await self._intake.create(request.spec, request.request_id, caller)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        # Without a reference, asyncio might garbage-collect the running task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _caller(self, context: Context, *, with_deadline: bool = True) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        base = str(metadata.get(names.LINK_BASE_METADATA, ""))
        sent = metadata.get(names.WARNING_METADATA)
        warning = sent.decode(errors="replace") if isinstance(sent, bytes) else ""
        return Caller(
            current_principal(),
            base if is_http_url(base) else self._deps.link_base,
            context.time_remaining() if with_deadline else None,
            warning[:_WARNING_MOST_CHARACTERS],
            str(metadata.get(names.FINGERPRINT_METADATA, ""))[:_FINGERPRINT_MOST_CHARACTERS],
        )


def _when_done(context: Context, callback: Callable[[], None]) -> None:
    """Makes gRPC call `callback` once the call has ended, at either side."""
    context.add_done_callback(lambda _: callback())  # type: ignore[arg-type] # the stub wants a class


def _job_id(name: str) -> int:
    """Returns the id in "jobs/{id}". Raises JobNotFoundError for a name of another form."""
    prefix, _, number = name.partition("/")
    if prefix == "jobs" and number.isascii() and number.isdigit() and len(number) < 12:
        job_id = int(number)
        if FIRST_JOB_ID <= job_id <= LAST_JOB_ID:
            return job_id
    raise errors.JobNotFoundError(name[:64])


def _page(request: service_pb2.ListJobsRequest) -> tuple[int, int]:
    """Returns the page size, and the id below which the page begins."""
    violations = []
    if not 0 <= request.page_size <= _PAGE_MOST:
        violations.append(out_of_range("page_size", 1, _PAGE_MOST))
    before = LAST_JOB_ID + 1
    if request.page_token:
        try:
            before = int(base64.urlsafe_b64decode(request.page_token).decode("ascii"))
        except (binascii.Error, ValueError):
            message = "page_token is not one that this service returned"
            violations.append(Violation("page_token", Reason.INVALID_FORMAT, message))
    if violations:
        raise errors.InvalidRequestError(violations)
    return request.page_size or _PAGE_DEFAULT, before


def _token(job_id: int) -> str:
    return base64.urlsafe_b64encode(str(job_id).encode()).decode()
