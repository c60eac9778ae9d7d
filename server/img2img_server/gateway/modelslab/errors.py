"""The errors of the gateway, and what the api's statuses become: docs/http-contract.md#errors.

Branches on ErrorInfo's reason, never on a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from img2img_server.domain.violations import Reason, Violation

RETRY_SECONDS = 30  # without an estimate

Detail = TypeVar("Detail", bound=Message)


class ErrorKind(Enum):
    """HTTP status, reason and default message of every error. The api's own reason replaces it."""

    INVALID_JSON = 400, "INVALID_JSON", "Invalid JSON body"
    FIELDS = 400, "INVALID_REQUEST", ""  # the sentence of the first field
    BAD_KEY = 401, "INVALID_API_KEY", "Invalid API key"
    FORBIDDEN = 403, "PERMISSION_DENIED", "This key lacks a permission"
    FOREIGN_PAGE = 403, "ORIGIN_NOT_ALLOWED", "Pages of this origin may not call this service"
    JOB_ENDED = 400, "JOB_ENDED", "The job has already ended"
    UNKNOWN_JOB = 404, "JOB_NOT_FOUND", "Request not found"
    NO_ROUTE = 404, "PATH_NOT_FOUND", "Not found"
    WRONG_METHOD = 405, "METHOD_NOT_ALLOWED", "Method not allowed"
    SLOW_BODY = 408, "BODY_TIMEOUT", "Request body took too long"
    REQUEST_ID_REUSED = 409, "REQUEST_ID_REUSED", "request_id was used for a different request"
    TOO_LARGE = 413, "BODY_TOO_LARGE", "Request body too large"
    RATE_LIMIT = 429, "RATE_LIMITED", "Rate limit exceeded"
    FAULT = 500, "INTERNAL", "Internal server error. Please try again."
    UNAVAILABLE = (
        503,
        "UNAVAILABLE",
        "Service temporarily unavailable. Please try again later.",
    )

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status = status
        self.reason = reason
        self.message = message


_OF_REASON = {
    **{kind.reason: kind for kind in ErrorKind},
    "QUEUE_FULL": ErrorKind.RATE_LIMIT,
    "TOO_MANY_CALLS": ErrorKind.RATE_LIMIT,
    "TOO_MANY_WATCHERS": ErrorKind.UNAVAILABLE,
    "NO_MODEL": ErrorKind.UNAVAILABLE,
    "MODEL_NOT_FOUND": ErrorKind.UNAVAILABLE,  # the operator's default model
    "STORAGE_KEYS_MISSING": ErrorKind.UNAVAILABLE,
    "MESSAGE_TOO_LARGE": ErrorKind.UNAVAILABLE,
}
# Of statuses without a reason, which are those of gRPC itself, or with one of a newer api.
_OF_STATUS = {
    grpc.StatusCode.UNAUTHENTICATED: ErrorKind.BAD_KEY,
    grpc.StatusCode.PERMISSION_DENIED: ErrorKind.FORBIDDEN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorKind.TOO_LARGE,
    grpc.StatusCode.UNAVAILABLE: ErrorKind.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorKind.UNAVAILABLE,
    grpc.StatusCode.CANCELLED: ErrorKind.UNAVAILABLE,  # a stopping api ends long calls so
}
# Kinds whose message does not say enough: these reasons bring the api's own.
_EXPLAINED = frozenset(
    {
        "PERMISSION_DENIED",
        "JOB_ENDED",
        "QUEUE_FULL",
        "RATE_LIMITED",
        "TOO_MANY_CALLS",
        "NO_MODEL",
        "STORAGE_KEYS_MISSING",
        "MESSAGE_TOO_LARGE",
    }
)


class RequestError(Exception):
    """The gateway rejects the request. The sentences are our own; response_formats.py replaces them
    by those of ModelsLab.

    Attributes:
        reason: For programs. Default: that of the kind.
        violations: With FIELDS only, in the order in which they are reported.
        retry_seconds: Whole seconds until a retry may succeed.
        metadata: That of the api's ErrorInfo.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str = "",
        *,
        reason: str = "",
        violations: list[Violation] | None = None,
        retry_seconds: int = RETRY_SECONDS,
        headers: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.reason = reason or kind.reason
        self.violations = violations or []
        self._message = message or kind.message
        self.metadata = metadata or {}
        self.retry_seconds = retry_seconds
        self.headers = dict(headers or {})
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The sentence for people: the given one, that of the first violation, or the kind's."""
        return self.violations[0].message if self.violations else self._message


def refusal(error: grpc.aio.AioRpcError, model: str = "") -> RequestError:
    """Returns what a failed call of the api means to the HTTP caller.

    Args:
        model: the one that the caller named.
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
        text if reason in _EXPLAINED else "",
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
    """Returns the violation as the api had it: the error's metadata has its values and cause."""
    prefix = f"{item.field}_"
    values = {
        name.removeprefix(prefix): value
        for name, value in metadata.items()
        if name.startswith(prefix)
    }
    cause = values.pop("cause", "")
    message = item.description.removesuffix(f": {cause}")
    return Violation(item.field, item.reason, message, cause, values)
