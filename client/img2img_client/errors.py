"""Every error that a call can raise. Branch on the class or on `reason`, never on the text.

Img2ImgError
├── RpcError                     the call was refused or broke
│   ├── InvalidRequestError      the request breaks rules; `violations` lists all of them
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
└── JobEndError                  the job ended without pictures; `job` is its record
    ├── JobFailedError           it could not be done; `reason` says why
    └── JobCancelledError        it was cancelled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from img2img_client.resources import Job

DETAILS_KEY = "grpc-status-details-bin"


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
    empty when the status came from the transport and not from the service. `retry_seconds`: when
    to try again, None when that would not help or is not known.
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
    """The service cannot be reached or is stopping, also after trying again."""


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


class JobCancelledError(JobEndError):
    """The job was cancelled."""

    reason = "CANCELLED"

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.name} was cancelled", job)


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


def from_rpc(error: grpc.RpcError, server: str) -> RpcError:
    """Turns what gRPC raised, sync or async, into a typed error. `server`: for the sentence."""
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
    return BY_REASON.get(reason, BY_CODE.get(code, RpcError))(
        _sentence(code, details, reason, violations, server),
        code=code,
        reason=reason,
        metadata=metadata,
        retry_seconds=retry_seconds,
        violations=tuple(violations),
    )


def _sentence(
    code: str, details: str, reason: str, violations: list[Violation], server: str
) -> str:
    if violations:
        return "; ".join(violation.description for violation in violations)
    if reason:
        return details
    if code == "UNAVAILABLE":  # of the transport: the last part of its chain says what happened
        return f"cannot reach the service at {server}: {details.rpartition(': ')[2] or 'no answer'}"
    if code == "DEADLINE_EXCEEDED":
        return f"{server} did not finish within the given time"
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
