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

from img2img_server.domain.params import Violation

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

    `violations` come with FIELDS only, in the order in which they are to be told.
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
    ) -> None:
        self.case = case
        self.reason = reason or case.reason
        self.violations = violations or []
        self.message = message or (
            self.violations[0].description if self.violations else case.message
        )
        self.retry_seconds = retry_seconds
        self.headers = dict(headers or {})
        super().__init__(self.message)


def refusal(error: grpc.aio.AioRpcError, model: str = "") -> RequestError:
    """What a failed call of the api means to the HTTP caller. `model`: the one that he named."""
    status = rpc_status.from_call(error) or status_pb2.Status()
    reason = _detail(status, error_details_pb2.ErrorInfo()).reason
    refused = _refusal(error, status, reason, model)
    refused.reason = reason or refused.reason
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
            return RequestError(ErrorKind.FIELDS, violations=[Violation("model", text)])
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
    request = _detail(status, error_details_pb2.BadRequest())
    return [_violation(item) for item in request.field_violations]


def _violation(item: error_details_pb2.BadRequest.FieldViolation) -> Violation:
    """With a cause, localized_message is the contract's sentence, which the description begins."""
    sentence = item.localized_message.message
    if sentence and item.description.startswith(f"{sentence}: "):
        return Violation(item.field, sentence, item.description[len(sentence) + 2 :])
    return Violation(item.field, item.description)


def _retry_seconds(info: error_details_pb2.RetryInfo) -> int:
    if not info.HasField("retry_delay"):
        return RETRY_SECONDS
    nanoseconds: int = info.retry_delay.ToNanoseconds()
    return max(1, math.ceil(nanoseconds / 1e9))
