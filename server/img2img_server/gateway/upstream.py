"""The gateway's gRPC client of the api. It calls with the key of the HTTP caller and raises
RequestError for every status but OK, decided by the reason and never by a text."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from img2img.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_pb2,
    job_pb2,
    service_pb2,
    service_pb2_grpc,
)
from img2img_server.compat.modelslab import names
from img2img_server.compat.modelslab.errors import RETRY_SECONDS, ErrorKind, RequestError
from img2img_server.domain.job import TERMINAL_STATES
from img2img_server.domain.violations import Reason, Violation
from img2img_server.tracing import injected

# The terminal states of the protocol, each with the name of its event.
_TERMINAL = {job_pb2.Job.State.Value(f"STATE_{state.name}"): state for state in TERMINAL_STATES}
ENDED = tuple(_TERMINAL)
# Errors that no retry of a stream removes.
_FINAL = (ErrorKind.BAD_KEY, ErrorKind.FORBIDDEN, ErrorKind.UNKNOWN_JOB)
_MAX_KEY_CHARACTERS = 1024  # characters; longer keys would exceed the limit on metadata
WATCH_AGAIN_SECONDS = 1.0  # seconds between two attempts at a stream
_CREATE_SECONDS = 60.0  # seconds; the time includes the download of the init image
_CREATE_AGAIN_SECONDS = 5.0  # seconds; how long a call that creates a job is repeated
_FIRST_PAUSE_SECONDS = 0.1  # seconds; the pause between two of these calls, doubled each time
_CALL_SECONDS = 10.0
_KEY_SECONDS = 1.0
_STORAGE_CHECK_SECONDS = 90.0  # seconds; the check makes three requests to the tenant's storage
# Errors by the reason of ErrorInfo.
_OF_REASON = {
    **{kind.reason: kind for kind in ErrorKind},
    "QUEUE_FULL": ErrorKind.RATE_LIMIT,
    "UPLOADS_FULL": ErrorKind.RATE_LIMIT,
    "UPLOADS_DISABLED": ErrorKind.UNAVAILABLE,
    "TOO_MANY_CALLS": ErrorKind.RATE_LIMIT,
    "TOO_MANY_WATCHERS": ErrorKind.UNAVAILABLE,
    "SERVER_BUSY": ErrorKind.UNAVAILABLE,
    "NO_MODEL": ErrorKind.UNAVAILABLE,
    "MODEL_NOT_FOUND": ErrorKind.UNAVAILABLE,  # The operator chose a default model that is missing.
    "STORAGE_KEYS_MISSING": ErrorKind.UNAVAILABLE,
    "STREAM_TOKEN_KEYS_MISSING": ErrorKind.UNAVAILABLE,
    "MESSAGE_TOO_LARGE": ErrorKind.UNAVAILABLE,
}
# Error kinds by status, for errors without a reason, which gRPC itself raises, or with a reason of
# a newer api.
_OF_STATUS = {
    grpc.StatusCode.UNAUTHENTICATED: ErrorKind.BAD_KEY,
    grpc.StatusCode.PERMISSION_DENIED: ErrorKind.FORBIDDEN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorKind.TOO_LARGE,
    grpc.StatusCode.UNAVAILABLE: ErrorKind.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorKind.UNAVAILABLE,
    # A stopping api ends long calls with this status.
    grpc.StatusCode.CANCELLED: ErrorKind.UNAVAILABLE,
}
_NO_KEY = (
    "No API key was sent: send it in the header Authorization as `Bearer KEY`, or in the header "
    "key or X-API-Key; it is never read from the query"
)
_NO_SUCH_KEY = (
    f"The API key is wrong: keys have at most {_MAX_KEY_CHARACTERS} printable ASCII characters and "
    "no spaces"
)
T = TypeVar("T")
Detail = TypeVar("Detail", bound=Message)


@dataclass(frozen=True, slots=True)
class Creation:
    """A job to create.

    Attributes:
        link_base: The base of the links of the job.
        request_id: Makes it safe to repeat the call.
        warning: Sentences for Job.warning about ignored values of the caller's request.
        fingerprint: That of the caller's request, if `spec` differs from it.
    """

    key: str
    spec: job_pb2.JobSpec
    link_base: str
    request_id: str
    warning: str = ""
    fingerprint: str = ""

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """Returns the metadata of the call."""
        metadata: list[tuple[str, str | bytes]] = [(names.LINK_BASE_METADATA, self.link_base)]
        if self.warning:
            metadata.append((names.WARNING_METADATA, self.warning.encode(errors="replace")))
        if self.fingerprint:
            metadata.append((names.FINGERPRINT_METADATA, self.fingerprint))
        return metadata


class Upstream:
    """Methods of the api, called with the key of the HTTP caller. They raise RequestError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub = self._stub = service_pb2_grpc.Img2ImgServiceStub(channel)
        admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        # Methods whose request is empty.
        self.caller = partial(_call, stub.GetCaller, service_pb2.GetCallerRequest())
        self.capabilities = partial(
            _call, stub.GetCapabilities, service_pb2.GetCapabilitiesRequest()
        )
        self.system_details = partial(
            _call, admin.GetSystemDetails, admin_service_pb2.GetSystemDetailsRequest()
        )
        self.restart = partial(_call, admin.RestartServer, admin_service_pb2.RestartServerRequest())
        self.update = partial(_call, admin.UpdateServer, admin_service_pb2.UpdateServerRequest())
        self.clear_cache = partial(_call, admin.ClearCache, admin_service_pb2.ClearCacheRequest())
        self.clear_queue = partial(_call, admin.ClearQueue, admin_service_pb2.ClearQueueRequest())

    async def tenant(self, key: str) -> str:
        """Returns the tenant of the key."""
        request = service_pb2.GetCallerRequest()
        return (await _call(self._stub.GetCaller, request, key, _KEY_SECONDS)).tenant

    async def create(self, creation: Creation) -> job_pb2.Job:
        """Creates a job, or returns the one that the request_id created before.

        Repeats the call while no api can be reached or says that it is unavailable.
        """
        spec, metadata = creation.spec, creation.metadata()
        request = service_pb2.CreateJobRequest(spec=spec, request_id=creation.request_id)
        until = time.monotonic() + _CREATE_AGAIN_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                response = await _call(
                    self._stub.CreateJob,
                    request,
                    creation.key,
                    _CREATE_SECONDS,
                    metadata,
                    spec.model,
                )
            except RequestError as error:
                is_down = error.kind is ErrorKind.UNAVAILABLE and error.reason == error.kind.reason
                if not is_down or time.monotonic() + pause > until:
                    raise
            else:
                return response.job
            await asyncio.sleep(pause)
            pause *= 2

    async def get(self, key: str, job_id: int | str) -> job_pb2.Job:
        """Returns the record of a job."""
        request = service_pb2.GetJobRequest(name=f"jobs/{job_id}")
        return (await _call(self._stub.GetJob, request, key)).job

    async def estimate(self, key: str, spec: job_pb2.JobSpec) -> service_pb2.EstimateJobResponse:
        """Estimates a job without creating it."""
        request = service_pb2.EstimateJobRequest(spec=spec)
        return await _call(self._stub.EstimateJob, request, key, model=spec.model)

    async def list_jobs(
        self, key: str, request: service_pb2.ListJobsRequest
    ) -> service_pb2.ListJobsResponse:
        """Returns a page of the tenant's jobs."""
        return await _call(self._stub.ListJobs, request, key)

    async def stream_token(self, key: str, job_id: str) -> service_pb2.CreateStreamTokenResponse:
        """Returns a token with which the job can be watched."""
        request = service_pb2.CreateStreamTokenRequest(name=f"jobs/{job_id}")
        return await _call(self._stub.CreateStreamToken, request, key)

    async def create_upload(
        self, key: str, request: service_pb2.CreateUploadRequest
    ) -> service_pb2.CreateUploadResponse:
        """Stores an init image, or returns where its file can be sent."""
        return await _call(self._stub.CreateUpload, request, key, _CREATE_SECONDS)

    async def upload(self, key: str, upload_id: str) -> service_pb2.GetUploadResponse:
        """Returns an upload."""
        request = service_pb2.GetUploadRequest(name=upload_id)
        return await _call(self._stub.GetUpload, request, key)

    async def complete_upload(self, key: str, upload_id: str) -> service_pb2.CompleteUploadResponse:
        """Checks the file of an upload, and returns the upload."""
        request = service_pb2.CompleteUploadRequest(name=upload_id)
        return await _call(self._stub.CompleteUpload, request, key, _CREATE_SECONDS)

    async def delete_upload(self, key: str, upload_id: str) -> service_pb2.DeleteUploadResponse:
        """Deletes an upload."""
        request = service_pb2.DeleteUploadRequest(name=upload_id)
        return await _call(self._stub.DeleteUpload, request, key)

    async def cancel(self, key: str, job_id: int | str) -> job_pb2.Job:
        """Cancels a job and returns its record."""
        request = service_pb2.CancelJobRequest(name=f"jobs/{job_id}")
        return (await _call(self._stub.CancelJob, request, key)).job

    async def watch(
        self, key: str, job_id: int | str, after_sequence: int = 0
    ) -> AsyncGenerator[event_pb2.JobEvent, None]:
        """Yields the events of a job, the last one included, without the api's heartbeats.

        Closing the generator ends the call, not the job.
        """
        request = service_pb2.WatchJobRequest(name=f"jobs/{job_id}", after_sequence=after_sequence)
        call = self._stub.WatchJob(request, metadata=_metadata(key))
        try:
            async for response in call:
                if not response.event.HasField("heartbeat"):
                    yield response.event
        except grpc.aio.AioRpcError as error:
            raise refusal(error) from error
        finally:
            call.cancel()

    async def ended(self, key: str, job_id: int | str) -> job_pb2.Job:
        """Returns the job once it has ended, whatever happens to the api or its streams."""
        while True:
            job = job_pb2.Job()
            with suppress(RequestError):
                async for event in self.watch(key, job_id):
                    kind = event.WhichOneof("event")
                    if kind in ("snapshot", *TERMINAL_STATES):
                        job = getattr(event, kind).job
            if job.state not in ENDED:
                with suppress(RequestError):
                    job = await self.get(key, job_id)
            if job.state in ENDED:
                return job
            await asyncio.sleep(WATCH_AGAIN_SECONDS)

    async def follow(self, key: str, job_id: int | str) -> AsyncGenerator[event_pb2.JobEvent, None]:
        """Yields the events of a job until its terminal one, in as many streams as that takes.

        While the api has no room for a stream, only the terminal event is yielded.

        Raises:
            RequestError: The job or its key does not exist any more.
        """
        seen = 0
        while True:
            try:
                async with aclosing(self.watch(key, job_id, seen)) as events:
                    async for event in events:
                        seen = max(seen, event.sequence)
                        yield event
                        if event.WhichOneof("event") in TERMINAL_STATES:
                            return
            except RequestError as error:
                if error.kind in _FINAL:
                    raise
            with suppress(RequestError):
                job = await self.get(key, job_id)
                if job.state in ENDED:
                    yield _terminal_event(job)
                    return
            await asyncio.sleep(WATCH_AGAIN_SECONDS)

    async def update_storage(
        self, key: str, request: service_pb2.UpdateStorageSettingsRequest
    ) -> service_pb2.UpdateStorageSettingsResponse:
        """Stores the tenant's S3 settings."""
        seconds = _STORAGE_CHECK_SECONDS if request.check_connection else _CALL_SECONDS
        return await _call(self._stub.UpdateStorageSettings, request, key, seconds)

    async def reset_storage(
        self, key: str, deploy_type: str
    ) -> service_pb2.ResetStorageSettingsResponse:
        """Removes the tenant's S3 settings."""
        request = service_pb2.ResetStorageSettingsRequest(deploy_type=deploy_type)
        return await _call(self._stub.ResetStorageSettings, request, key)


def _terminal_event(job: job_pb2.Job) -> event_pb2.JobEvent:
    event = event_pb2.JobEvent(job=job.name)
    getattr(event, _TERMINAL[job.state]).job.CopyFrom(job)
    return event


async def _call(
    method: Callable[..., Awaitable[T]],
    request: object,
    key: str,
    seconds: float = _CALL_SECONDS,
    metadata: Sequence[tuple[str, str | bytes]] = (),
    model: str = "",
) -> T:
    try:
        return await method(request, metadata=(*_metadata(key), *metadata), timeout=seconds)
    except grpc.aio.AioRpcError as error:
        raise refusal(error, model) from error


def _metadata(key: str) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a call. Raises BAD_KEY if metadata cannot contain the key."""
    if not key:
        raise RequestError(ErrorKind.BAD_KEY, _NO_KEY)
    if len(key) > _MAX_KEY_CHARACTERS or not all("!" <= char <= "~" for char in key):
        raise RequestError(ErrorKind.BAD_KEY, _NO_SUCH_KEY)
    return (("authorization", f"Bearer {key}"), *injected().items())


def refusal(error: grpc.aio.AioRpcError, model: str = "") -> RequestError:
    """Returns the RequestError for a failed call of the api.

    Args:
        model: The model that the caller named.
    """
    status = rpc_status.from_call(error) or status_pb2.Status()
    info = _detail(status, error_details_pb2.ErrorInfo())
    request = _detail(status, error_details_pb2.BadRequest())
    retry = _detail(status, error_details_pb2.RetryInfo())
    text, reason = error.details() or "", info.reason
    violations = [_violation(item, info.metadata) for item in request.field_violations]
    if model and reason == "MODEL_NOT_FOUND":
        violations = [Violation("model", Reason.NOT_SUPPORTED, text)]
    kind = _OF_REASON.get(reason) or _OF_STATUS.get(error.code(), ErrorKind.FAULT)
    seconds = math.ceil(retry.retry_delay.ToNanoseconds() / 1e9)
    return RequestError(
        ErrorKind.FIELDS if violations else kind,
        text if reason else "",  # gRPC's own texts may have addresses.
        reason=reason,
        violations=violations,
        retry_seconds=max(1, seconds) if retry.HasField("retry_delay") else RETRY_SECONDS,
        metadata=dict(info.metadata),
    )


def _detail(status: status_pb2.Status, empty: Detail) -> Detail:
    for packed in status.details:
        if packed.Unpack(empty):
            break
    return empty


def _violation(
    item: error_details_pb2.BadRequest.FieldViolation, metadata: Mapping[str, str]
) -> Violation:
    """Returns a violation of the api, with values and cause from the error's metadata."""
    prefix = f"{item.field}_"
    values = {
        name.removeprefix(prefix): value
        for name, value in metadata.items()
        if name.startswith(prefix)
    }
    cause = values.pop("cause", "")
    message = item.description.removesuffix(f": {cause}")
    return Violation(item.field, item.reason, message, cause, values)
