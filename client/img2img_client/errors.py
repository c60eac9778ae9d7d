"""Every error that a call can raise. Branch on the class or on `reason`, never on the text.

Img2ImgError
├── RpcError                     the call was refused or broke
│   ├── InvalidRequestError      the request breaks rules; `violations` lists all of them
│   │   └── InvalidArgumentError        found by this client, nothing was sent; also a ValueError
│   │       ├── InvalidArgumentTypeError    no such option, or a wrong type; also a TypeError
│   │       └── InitImageFileError          its file cannot be read; also an OSError
│   │           └── InitImageNotFoundError      there is no such file; also a FileNotFoundError
│   ├── UnauthenticatedError     no API key, or one that is not known
│   ├── PermissionDeniedError    the key may not ask for this
│   ├── NotFoundError            no such job (JOB_NOT_FOUND) or model (MODEL_NOT_FOUND)
│   ├── RequestIdReusedError     the request_id was used for another request
│   ├── JobEndedError            the job can no longer be cancelled
│   ├── DeadlineTooShortError    the job cannot finish within the deadline
│   ├── QueueFullError           too many unfinished jobs or watchers; wait `retry_seconds`
│   ├── RateLimitedError         too many jobs in a minute; wait `retry_seconds`
│   ├── DeadlineExceededError    the caller's timeout passed
│   ├── UnavailableError         the service cannot be reached, also after trying again
│   └── InternalError            a fault of the service, logged there under metadata["error_id"]
├── JobEndError                  the job ended without pictures; `job` is its record
│   ├── JobFailedError           it could not be done; `reason` says why
│   └── JobCancelledError        it was cancelled
├── ClientClosedError            the client was closed before or during the call; also a ValueError
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

# Reasons of this client; all others are the service's.
INVALID_REQUEST = "INVALID_REQUEST"  # as the service calls it
NO_API_KEY = "NO_API_KEY"
TRANSPORT = "TRANSPORT"  # the status came from the connection, the service said nothing
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
CLIENT_CLOSED = "CLIENT_CLOSED"
STREAM_CLOSED = "STREAM_CLOSED"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: the field as named in JobSpec and a sentence about it."""

    field: str
    description: str


class Img2ImgError(Exception):
    """Root of everything that this client raises on purpose."""

    reason: str = ""


class RpcError(Img2ImgError):
    """A call was refused or broke.

    `code`: the gRPC status, for example "INVALID_ARGUMENT". `reason`: the service's word for it,
    TRANSPORT when the status came from the connection and not from the service. `retry_seconds`:
    when to try again, None when that would not help or is not known.
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
    """Arguments that this client refuses by itself: nothing was sent."""

    def __init__(self, *violations: Violation) -> None:
        super().__init__(
            "; ".join(violation.description for violation in violations),
            code="INVALID_ARGUMENT",
            reason=INVALID_REQUEST,
            violations=violations,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.violations


class InvalidArgumentTypeError(InvalidArgumentError, TypeError):
    """There is no such option, or an argument has a type that it cannot have."""


class InitImageFileError(InvalidArgumentError, OSError):
    """The init image's file cannot be read; `errno`, `strerror` and `filename` as in OSError."""

    def __init__(self, path: Path, error: OSError) -> None:
        text = f"cannot read the init image {path}: {error.strerror or error}"
        super().__init__(Violation("init_image", text))
        self.errno, self.strerror, self.filename = error.errno, error.strerror, str(path)

    def __str__(self) -> str:
        return self.violations[0].description

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (Path(self.filename), OSError(self.errno, self.strerror))


class InitImageNotFoundError(InitImageFileError, FileNotFoundError):
    """There is no such file."""


class UnauthenticatedError(RpcError):
    """No API key, or one that is not known."""


class PermissionDeniedError(RpcError):
    """The key may not ask for this."""


class NotFoundError(RpcError):
    """No such job of this tenant, or no such model."""


class RequestIdReusedError(RpcError):
    """The request_id was used for a request with another content."""


class JobEndedError(RpcError):
    """The job has already succeeded or failed."""


class DeadlineTooShortError(RpcError):
    """The job cannot finish within the deadline; `retry_seconds` may help, more time will."""


class QueueFullError(RpcError):
    """The tenant has as many unfinished jobs, or the server as many watchers, as it may have."""


class RateLimitedError(RpcError):
    """The key makes jobs faster than it may; `retry_seconds` says when there is room."""


class DeadlineExceededError(RpcError):
    """The caller's timeout passed."""


class UnavailableError(RpcError):
    """The service cannot be reached or is stopping, also after trying again.

    When the connection fails, `reason` is TRANSPORT and metadata["cause"] is a word of
    `img2img_client.diagnosis.Cause`.
    """


class InternalError(RpcError):
    """A fault of the service, logged there under metadata["error_id"]."""


class JobEndError(Img2ImgError):
    """The job ended without succeeding; `job` is its record."""

    def __init__(self, message: str, job: Job) -> None:
        super().__init__(message)
        self.job = job


class JobFailedError(JobEndError):
    """The job could not be done. `retryable`: the same request may work later."""

    def __init__(self, job: Job) -> None:
        error = job.error
        super().__init__(f"{job.name} failed: {error.message if error else 'no reason given'}", job)
        self.reason = error.reason if error else ""
        self.retryable = bool(error and error.retryable)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.job,)


class JobCancelledError(JobEndError):
    """The job was cancelled."""

    reason = "CANCELLED"

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.name} was cancelled", job)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.job,)


class ClientClosedError(Img2ImgError, ValueError):
    """The client was closed before or during the call."""

    reason = CLIENT_CLOSED

    def __init__(self) -> None:
        super().__init__("this client is closed: make a new one")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class StreamClosedError(Img2ImgError, RuntimeError):
    """The stream was closed before its job had ended, so there is no result."""

    reason = STREAM_CLOSED

    def __init__(self) -> None:
        super().__init__("the stream was closed before the job had ended")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


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
    """Turns what gRPC raised, sync or async, into a typed error."""
    call: Any = error  # what a failed call raises is the call itself, with code and details
    code = call.code().name
    details = call.details() or ""
    status = _rich_status(call.trailing_metadata())
    reason, metadata = "", {}
    retry_seconds: float | None = None
    violations: list[Violation] = []
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_seconds = delay.seconds + delay.nanos / 1e9
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            broken = error_details_pb2.BadRequest.FromString(detail.value).field_violations
            violations += [Violation(one.field, one.description) for one in broken]
    if not reason:
        text = _transport_sentence(code, details, endpoint.target)
        reason = DEADLINE_EXCEEDED if code == DEADLINE_EXCEEDED else TRANSPORT
    elif code == "UNAUTHENTICATED" and not endpoint.api_key:
        text = "no API key was given: pass api_key or set IMG2IMG_API_KEY"
        reason = NO_API_KEY
    else:
        text = "; ".join(violation.description for violation in violations) or details
    return BY_REASON.get(reason, BY_CODE.get(code, RpcError))(
        text,
        code=code,
        reason=reason,
        metadata=metadata,
        retry_seconds=retry_seconds,
        violations=tuple(violations),
    )


def unavailable(server: str, what: str, cause: str) -> UnavailableError:
    """The error of a connection that cannot be made. `what`: a clause that says why."""
    return UnavailableError(
        f"cannot reach the service at {server}: {what}",
        code="UNAVAILABLE",
        reason=TRANSPORT,
        metadata={"cause": cause},
    )


def _transport_sentence(code: str, details: str, server: str) -> str:
    if code == "UNAVAILABLE":
        return f"cannot reach the service at {server}: {details or 'gRPC does not say why'}"
    if code == "DEADLINE_EXCEEDED":
        return f"{server} did not finish within the given time"
    if code == "UNIMPLEMENTED":
        return f"{server} answers, but does not offer this call ({details}): is it img2img?"
    return details or f"the call ended with {code}"


def _rich_status(trailing_metadata: Any) -> status_pb2.Status:
    """google.rpc.Status of a failed call; empty when it has none or a proxy garbled it."""
    for key, value in trailing_metadata or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()
