"""Every error that a call can raise. Branch on the class or on `reason`, never on the text.

Img2ImgError
├── RpcError                     the service rejected the call, or the connection failed
│   ├── InvalidRequestError      the request breaks rules; `violations` lists all of them
│   │   └── InvalidArgumentError        rejected by this client before sending; also a ValueError
│   │       ├── InvalidArgumentTypeError    unknown option or wrong type; also a TypeError
│   │       └── InitImageFileError          its file cannot be read; also an OSError
│   │           └── InitImageNotFoundError      its file does not exist; also a FileNotFoundError
│   ├── UnauthenticatedError     the API key is missing or unknown
│   ├── PermissionDeniedError    the API key lacks the permission
│   ├── NotFoundError            the job (JOB_NOT_FOUND) or model (MODEL_NOT_FOUND) does not exist
│   ├── RequestIdReusedError     the request_id was used for another request
│   ├── JobEndedError            the job has ended, so it cannot be cancelled
│   ├── DeadlineTooShortError    the job cannot finish within the deadline
│   ├── QueueFullError           too many unfinished jobs or watchers; wait `retry_seconds`
│   ├── RateLimitedError         too many jobs in a minute; wait `retry_seconds`
│   ├── DeadlineExceededError    the caller's timeout passed
│   ├── UnavailableError         the service cannot be reached, retries included
│   └── InternalError            a bug in the service, logged there under metadata["error_id"]
├── JobEndError                  the job ended without images; `job` is its record
│   ├── JobFailedError           the job failed; `reason` says why
│   └── JobCancelledError        the job was cancelled
├── ClientClosedError            the client or its channel is closed; also a ValueError
├── ClientUsageError             used in another event loop or process; also a RuntimeError
└── StreamClosedError            the stream was closed before its job ended; also a RuntimeError
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from img2img_client.channel import Endpoint
    from img2img_client.resources import Job

DETAILS_KEY = "grpc-status-details-bin"

# Reasons that this client sets. All other reasons come from the service.
INVALID_REQUEST = "INVALID_REQUEST"  # The service uses the same reason.
NO_API_KEY = "NO_API_KEY"
UNAVAILABLE = "UNAVAILABLE"  # The service uses this reason while it has no NATS.
TRANSPORT = "TRANSPORT"  # The connection failed, so the service sent no status.
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
NO_EVENT_LOOP = "NO_EVENT_LOOP"
OTHER_EVENT_LOOP = "OTHER_EVENT_LOOP"
OTHER_PROCESS = "OTHER_PROCESS"
FORK_NOT_SUPPORTED = "FORK_NOT_SUPPORTED"
STREAM_IN_USE = "STREAM_IN_USE"

USAGE_TEXTS = {
    NO_EVENT_LOOP: "AsyncClient needs a running asyncio event loop: call it in a coroutine that "
    "asyncio runs, or use Client",
    OTHER_EVENT_LOOP: "this AsyncClient belongs to another event loop: create a client in each "
    "event loop, or use Client",
    OTHER_PROCESS: "another process opened this stream, and this one was forked from it: open a "
    "stream in this process, for example with watch",
    FORK_NOT_SUPPORTED: "this process was forked after gRPC was used, and GRPC_ENABLE_FORK_SUPPORT "
    "turns gRPC's support for that off: unset it, or start processes with the method spawn",
    STREAM_IN_USE: "another thread or task reads this stream: give each reader its own stream, for "
    "example with watch",
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: the field as named in JobSpec, a sentence, and a reason to branch on."""

    field: str
    description: str
    reason: str = ""


class Img2ImgError(Exception):
    """Base class of all errors of this client."""

    reason: str = ""


class RpcError(Img2ImgError):
    """The service rejected the call, or the connection failed.

    `code`: the gRPC status, for example "INVALID_ARGUMENT". `reason`: the service's reason, or
    TRANSPORT when the connection failed. `retry_seconds`: when to try again; None when a retry does
    not help or the time is unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_seconds: float | None = None,
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_seconds = retry_seconds
        self.violations = violations


class InvalidRequestError(RpcError):
    """The request breaks rules; `violations` lists all of them."""


class InvalidArgumentError(InvalidRequestError, ValueError):
    """This client rejects an argument; nothing was sent."""

    def __init__(self, *violations: Violation) -> None:
        text = "; ".join(violation.description for violation in violations)
        super().__init__(
            text, code="INVALID_ARGUMENT", reason=INVALID_REQUEST, violations=violations
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.violations


class InvalidArgumentTypeError(InvalidArgumentError, TypeError):
    """The option does not exist, or an argument has the wrong type."""


class InitImageFileError(InvalidArgumentError, OSError):
    """The init image's file cannot be read; `errno`, `strerror` and `filename` as in OSError."""

    def __init__(self, path: Path, error: OSError) -> None:
        text = f"cannot read the init image {path}: {error.strerror or error}"
        super().__init__(Violation("init_image", text, "INVALID_IMAGE"))
        self.errno, self.strerror, self.filename = error.errno, error.strerror, str(path)

    def __str__(self) -> str:
        return self.violations[0].description

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (Path(self.filename), OSError(self.errno, self.strerror))


class InitImageNotFoundError(InitImageFileError, FileNotFoundError):
    """The init image's file does not exist."""


class UnauthenticatedError(RpcError):
    """The API key is missing or unknown."""


class PermissionDeniedError(RpcError):
    """The API key lacks the permission."""


class NotFoundError(RpcError):
    """The tenant has no such job, or no worker serves such a model."""


class RequestIdReusedError(RpcError):
    """The request_id was used for a request with different content."""


class JobEndedError(RpcError):
    """The job has already succeeded or failed."""


class DeadlineTooShortError(RpcError):
    """The job cannot finish within the deadline. Use a longer timeout, or try again after
    `retry_seconds`.
    """


class QueueFullError(RpcError):
    """The tenant reached its limit of unfinished jobs, or the server its limit of watchers."""


class RateLimitedError(RpcError):
    """The key creates jobs too fast; retry after `retry_seconds`."""


class DeadlineExceededError(RpcError):
    """The caller's timeout passed."""


class UnavailableError(RpcError):
    """The service cannot be reached or is stopping, retries included.

    When the connection failed, `reason` is TRANSPORT and metadata["cause"] is a value of
    `img2img_client.Cause`.
    """


class InternalError(RpcError):
    """A bug in the service, logged there under metadata["error_id"]."""


class JobEndError(Img2ImgError):
    """The job ended without images; `job` is its record."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.job = job


class JobFailedError(JobEndError):
    """The job failed. `retryable`: the same request may succeed later."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.reason = job.error.reason if job.error else ""
        self.retryable = bool(job.error and job.error.retryable)

    def __str__(self) -> str:
        message = self.job.error.message if self.job.error else "no reason given"
        return f"{self.job.name} failed: {message}"


class JobCancelledError(JobEndError):
    """The job was cancelled."""

    reason = "CANCELLED"

    def __str__(self) -> str:
        return f"{self.job.name} was cancelled"


class ClientClosedError(Img2ImgError, ValueError):
    """The client or its channel was closed before or during the call."""

    reason = "CLIENT_CLOSED"

    def __str__(self) -> str:
        return "the client or its channel is closed: create a new client"


class ClientUsageError(Img2ImgError, RuntimeError):
    """The client or a stream is used where it cannot work; nothing was sent.

    `reason`: NO_EVENT_LOOP, OTHER_EVENT_LOOP, OTHER_PROCESS, FORK_NOT_SUPPORTED or STREAM_IN_USE.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return USAGE_TEXTS.get(self.reason, self.reason)


class StreamClosedError(Img2ImgError, RuntimeError):
    """The stream was closed before its job ended, so there is no result."""

    reason = "STREAM_CLOSED"

    def __str__(self) -> str:
        return "the stream was closed before the job had ended"


BY_REASON: dict[str, type[RpcError]] = {
    "DEADLINE_TOO_SHORT": DeadlineTooShortError,
    "JOB_ENDED": JobEndedError,
    "RATE_LIMITED": RateLimitedError,
}
BY_CODE: dict[str, type[RpcError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": RequestIdReusedError,
    "RESOURCE_EXHAUSTED": QueueFullError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
    "INTERNAL": InternalError,
}


def from_call(error: grpc.RpcError, endpoint: Endpoint) -> RpcError:
    """Returns the typed error for an error that gRPC raised, blocking or asyncio."""
    call: Any = error  # gRPC raises the failed call itself, which has code and details.
    status = call.code() if hasattr(call, "code") else None  # An interceptor may raise anything.
    code = status.name if status is not None else "UNKNOWN"
    details = (call.details() if hasattr(call, "details") else str(error)) or ""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    bad_request = error_details_pb2.BadRequest()
    trailing = call.trailing_metadata() if hasattr(call, "trailing_metadata") else ()
    for detail in _rich_status(trailing).details:
        for message in (info, retry, bad_request):
            detail.Unpack(message)  # Unpack does nothing for a detail of another type.
    delay = retry.retry_delay
    violations = tuple(
        Violation(broken.field, broken.description, broken.reason)
        for broken in bad_request.field_violations
    )
    reason = info.reason
    if not reason:
        text = _transport_text(code, details, endpoint.description)
        reason = DEADLINE_EXCEEDED if code == DEADLINE_EXCEEDED else TRANSPORT
    elif code == "UNAUTHENTICATED" and not endpoint.api_key:
        text = "no API key was given: pass api_key or set IMG2IMG_API_KEY"
        reason = NO_API_KEY
    else:
        text = "; ".join(violation.description for violation in violations) or details
    kind = BY_REASON.get(reason, BY_CODE.get(code, RpcError))
    if not info.reason and code == "RESOURCE_EXHAUSTED":
        kind = RpcError  # The limit is gRPC's, not the service's.
    return kind(
        text,
        code=code,
        reason=reason,
        metadata=info.metadata,
        retry_seconds=delay.seconds + delay.nanos / 1e9 if retry.HasField("retry_delay") else None,
        violations=violations,
    )


def invalid(field: str, reason: str, description: str) -> InvalidArgumentError:
    """Returns the error of an argument that this client rejects."""
    return InvalidArgumentError(Violation(field, description, reason))


def invalid_type(field: str, expected: str, value: object) -> InvalidArgumentTypeError:
    """Returns the error of an argument with the wrong type."""
    text = f"{field} must be {expected}, not {type(value).__name__}"
    return InvalidArgumentTypeError(Violation(field, text, "INVALID_TYPE"))


def unavailable(text: str, **metadata: str) -> UnavailableError:
    """Returns the error of a connection that failed."""
    return UnavailableError(text, code="UNAVAILABLE", reason=TRANSPORT, metadata=metadata)


def _transport_text(code: str, details: str, service: str) -> str:
    if code == "UNAVAILABLE":
        return f"cannot reach {service}: {details or 'gRPC gives no reason'}"
    if code == "DEADLINE_EXCEEDED":
        return f"{service} did not finish within the given time"
    if code == "UNIMPLEMENTED":
        return f"{service} does not offer this call ({details}): is it img2img?"
    if code == "RESOURCE_EXHAUSTED":
        return f"gRPC refuses the call: {details}; open a channel of yours with CHANNEL_OPTIONS"
    return details or f"the call ended with {code}"


def _rich_status(trailing_metadata: Any) -> status_pb2.Status:
    """Returns the google.rpc.Status of a failed call, empty if it is missing or damaged."""
    encoded = dict(trailing_metadata or ()).get(DETAILS_KEY, b"")
    try:
        return status_pb2.Status.FromString(encoded)
    except DecodeError:
        return status_pb2.Status()
