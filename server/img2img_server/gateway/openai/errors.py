"""Builds errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.response_formats import Reply, retry_headers
from img2img_server.domain.violations import Violation

PREFIXES: Final = ("/v1/images", "/v1/models")
# OpenAI's clients repeat a request after 408, 409, 429 and 5xx, unless this header says otherwise.
SHOULD_RETRY: Final = "x-should-retry"
_NEVER: Final = {SHOULD_RETRY: "false"}
_CODES: Final = {
    ErrorKind.BAD_KEY: "invalid_api_key",
    ErrorKind.RATE_LIMIT: "rate_limit_exceeded",
    ErrorKind.NO_ROUTE: "unknown_url",
}
_TYPES: Final = {
    ErrorKind.RATE_LIMIT: "rate_limit_error",
    ErrorKind.FORBIDDEN: "permission_error",
    ErrorKind.FAULT: "server_error",
    ErrorKind.UNAVAILABLE: "server_error",
}
# Names of our fields that differ from OpenAI's.
_FIELDS: Final = {
    "samples": "n",
    "init_image": "image",
    "width": "size",
    "height": "size",
    "track_id": "user",
    "output_quality": "output_compression",
}


def serves(path: str) -> bool:
    """Returns whether the path belongs to OpenAI's API."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in PREFIXES)


class ErrorFormat:
    """The format of every error below the paths of OpenAI's API."""

    def error(self, error: RequestError) -> Reply:
        """Returns the response to a rejected request."""
        kind, status = error.kind, error.kind.status
        code = _CODES.get(kind) or error.reason.lower()
        param: str | None = None
        headers = dict(retry_headers(error))
        if error.violations:
            first = error.violations[0]
            param, code = first.field, first.reason.lower()
        if error.reason == "MODEL_NOT_FOUND":
            status, code = 404, "model_not_found"
        if kind is ErrorKind.REQUEST_ID_REUSED:
            headers |= _NEVER
        message = "; ".join(violation.text for violation in error.violations) or error.message
        return (
            _body(message, _TYPES.get(kind, "invalid_request_error"), param, code),
            status,
            headers,
        )

    def ended(self, job: job_pb2.Job) -> Reply:
        """Returns the response for a job that failed or was cancelled."""
        if job.state == job_pb2.Job.STATE_CANCELLED:
            body = _body("The job was cancelled", "invalid_request_error", None, "job_cancelled")
            return body, 409, dict(_NEVER)
        reason, message = job.error.reason, job.error.message
        if reason == "INIT_IMAGE_INVALID":
            return _body(message, "invalid_request_error", "image", reason.lower()), 400, {}
        headers = {} if job.error.retryable else dict(_NEVER)
        return _body(message, "server_error", None, reason.lower()), 500, headers


def renamed(violation: Violation) -> Violation:
    """Returns the violation with OpenAI's name of the field."""
    name = _FIELDS.get(violation.field)
    if name is None:
        return violation
    message = violation.message
    if name != "size":  # "width must be ..." says which part of the size is wrong.
        message = message.replace(violation.field, name, 1)
    return replace(violation, field=name, message=message)


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
