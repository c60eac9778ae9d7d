"""Why a request is refused: the cases of section 6.4 of the HTTP contract, and how the api's
statuses become them. Branches on ErrorInfo's reason, never on text."""

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

# The api is down, stopping or stuck; CANCELLED is how a stopping one ends what lasts too long.
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
Detail = TypeVar("Detail", bound=Message)


class ErrorKind(Enum):
    """HTTP code, reason and default message of every refusal. The api's own reason replaces it."""

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


class RequestError(Exception):
    """The request is refused. `message` and `reason` replace the case's own; `retry_seconds` are
    whole.

    `violations` come with FIELDS only, in the order in which they are to be told. `metadata` is
    that of the api's ErrorInfo. Message and violations are in our own words; response_formats.py
    puts them into those of the contract.
    """

    def __init__(
        self,
        case: ErrorKind,
        message: str = "",
        *,
        reason: str = "",
        violations: list[Violation] | None = None,
        retry_seconds: int = RETRY_SECONDS,
        headers: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.case = case
        self.reason = reason or case.reason
        self.violations = violations or []
        self.message = message or (self.violations[0].message if self.violations else case.message)
        self.metadata = metadata or {}
        self.retry_seconds = retry_seconds
        self.headers = dict(headers or {})
        super().__init__(self.message)


def refusal(error: grpc.aio.AioRpcError, model: str = "") -> RequestError:
    """What a failed call of the api means to the HTTP caller. `model`: the one that he named."""
    status = rpc_status.from_call(error) or status_pb2.Status()
    info = _detail(status, error_details_pb2.ErrorInfo())
    refused = _refusal(error, status, info.reason, model)
    refused.reason = info.reason or refused.reason
    refused.metadata = dict(info.metadata)
    return refused


def _refusal(
    error: grpc.aio.AioRpcError, status: status_pb2.Status, reason: str, model: str
) -> RequestError:
    retry = _retry_seconds(_detail(status, error_details_pb2.RetryInfo()))
    text = error.details() or ""
    match error.code(), reason:
        case grpc.StatusCode.INVALID_ARGUMENT, _ if violations := _violations(status):
            return RequestError(ErrorKind.FIELDS, violations=violations)
        case grpc.StatusCode.UNAUTHENTICATED, _:
            return RequestError(ErrorKind.BAD_KEY)
        case grpc.StatusCode.PERMISSION_DENIED, _:
            return RequestError(ErrorKind.FORBIDDEN, text)
        case grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND":
            return RequestError(ErrorKind.UNKNOWN_JOB)
        case grpc.StatusCode.RESOURCE_EXHAUSTED, "":  # gRPC's own: the message is too large
            return RequestError(ErrorKind.TOO_LARGE)
        case grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS":
            return RequestError(ErrorKind.UNAVAILABLE, retry_seconds=retry)
        case grpc.StatusCode.RESOURCE_EXHAUSTED, _:
            return RequestError(ErrorKind.RATE_LIMIT, text, retry_seconds=retry)
        case grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED":
            return RequestError(ErrorKind.JOB_ENDED, text)
        case grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED":
            return RequestError(ErrorKind.REQUEST_ID_REUSED)
        case grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND" if model:
            return RequestError(
                ErrorKind.FIELDS, violations=[Violation("model", Reason.NOT_SUPPORTED, text)]
            )
        # An api of an older version says so to the callers of the contract, who name no model.
        case grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND":
            return RequestError(ErrorKind.UNAVAILABLE)
        case grpc.StatusCode.UNAVAILABLE, "NO_MODEL":
            return RequestError(ErrorKind.UNAVAILABLE, text, retry_seconds=retry)
        case grpc.StatusCode.FAILED_PRECONDITION, "STORAGE_KEYS_MISSING" | "MESSAGE_TOO_LARGE":
            return RequestError(ErrorKind.UNAVAILABLE, text)
        case code, _ if code in _AWAY:
            return RequestError(ErrorKind.UNAVAILABLE, retry_seconds=retry)
        case _:
            return RequestError(ErrorKind.FAULT)


def _detail(status: status_pb2.Status, empty: Detail) -> Detail:
    for packed in status.details:
        if packed.Unpack(empty):
            break
    return empty


def _violations(status: status_pb2.Status) -> list[Violation]:
    metadata = _detail(status, error_details_pb2.ErrorInfo()).metadata
    request = _detail(status, error_details_pb2.BadRequest())
    return [_violation(item, metadata) for item in request.field_violations]


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


def _retry_seconds(info: error_details_pb2.RetryInfo) -> int:
    if not info.HasField("retry_delay"):
        return RETRY_SECONDS
    nanoseconds: int = info.retry_delay.ToNanoseconds()
    return max(1, math.ceil(nanoseconds / 1e9))
