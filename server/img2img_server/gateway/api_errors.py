"""What a failed call of the api means to HTTP callers: decided by its reason, never by a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from img2img_server.compat.modelslab.errors import RETRY_SECONDS, ErrorKind, RequestError
from img2img_server.domain.violations import Reason, Violation

Detail = TypeVar("Detail", bound=Message)


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
# The api's sentence says more than that of the kind.
_EXPLAINED = (ErrorKind.FORBIDDEN, ErrorKind.JOB_ENDED, ErrorKind.RATE_LIMIT)
_EXPLAINED_REASONS = ("NO_MODEL", "STORAGE_KEYS_MISSING", "MESSAGE_TOO_LARGE")


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
        text if kind in _EXPLAINED or reason in _EXPLAINED_REASONS else "",
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
