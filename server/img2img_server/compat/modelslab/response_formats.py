"""Builds bodies and HTTP statuses of default mode, legacy mode and /v1.

See docs/http-contract.md#modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import responses, sentences
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.domain.violations import Violation

Body: TypeAlias = Mapping[str, Any]
Reply: TypeAlias = tuple[Body, int, dict[str, str]]  # body, HTTP status, headers
TIP = "Send the API key that the operator of this service gave you."
TIPS = "Wait for your queued requests to finish, or ask the operator for a higher limit."


class ErrorFormat(Protocol):
    """The format of the errors of one API."""

    def error(self, error: RequestError) -> Reply:
        """Returns the response to a rejected request."""
        ...


class Plain:
    """Errors with our own sentences: HTTP status, `message`, and `reason` as over gRPC."""

    def error(self, error: RequestError) -> Reply:
        """Returns the response to a rejected request."""
        return self._error(error, error.message, error.violations)

    def _error(self, error: RequestError, message: str, violations: Iterable[Violation]) -> Reply:
        body: dict[str, Any] = {"status": "error", "message": message, "reason": error.reason}
        if violations:
            body["errors"] = _by_field((v.field, v.text) for v in violations)
        if error.kind is ErrorKind.RATE_LIMIT:
            body["retry_after"] = error.retry_seconds
        return body, error.kind.status, retry_headers(error)


class Current(Plain):
    """ModelsLab's responses in default mode.

    Bodies about jobs have HTTP status 200, since the call itself succeeded. `fetched` is true in
    the response to a fetch, and false in the response to the request that made the job.
    """

    def error(self, error: RequestError) -> Reply:
        named = [replace(v, message=sentences.field_sentence(v)) for v in error.violations]
        return self._error(error, named[0].message if named else _sentence(error), named)

    def success(self, job: job_pb2.Job, output: Sequence[str], *, fetched: bool) -> Body:
        """Returns the body for a job that succeeded."""
        return responses.success(job, output)

    def processing(self, job: job_pb2.Job, fetch_result: str, *, fetched: bool) -> Body:
        """Returns the body for a job that has not ended."""
        return responses.processing(job, fetch_result, responses.PROCESSING)

    def failed(self, job: job_pb2.Job) -> Body:
        """Returns the body for a job that failed."""
        return responses.failed(job)


class Legacy(Current):
    """ModelsLab's responses in legacy mode: status 200, `messege`, and fetches with few keys."""

    def error(self, error: RequestError) -> Reply:
        message: Any = _sentence(error)
        if error.kind is ErrorKind.UNKNOWN_JOB:
            body = {"status": "failed", "id": "", "message": message, "output": "", "tip": ""}
            return body, 200, {}
        more: dict[str, Any] = {}
        if error.violations:
            named = [(v.field, sentences.legacy_field_sentence(v)) for v in error.violations]
            message = _by_field(named)
        elif error.kind is ErrorKind.BAD_KEY:
            message, more = "Invalid Api Key", {"tip": TIP}
        elif error.kind is ErrorKind.RATE_LIMIT:
            message = ErrorKind.RATE_LIMIT.message
            more = {"tips": TIPS, "retry_after": error.retry_seconds}
        body = {"status": "error", "message": message, "messege": message, **more}
        is_routing = error.kind in (ErrorKind.NO_ROUTE, ErrorKind.WRONG_METHOD)
        return body, error.kind.status if is_routing else 200, retry_headers(error)

    def success(self, job: job_pb2.Job, output: Sequence[str], *, fetched: bool) -> Body:
        body = super().success(job, output, fetched=fetched)
        keys = ("status", "id", "output", "proxy_links") if fetched else body
        return {key: body[key] for key in keys}

    def processing(self, job: job_pb2.Job, fetch_result: str, *, fetched: bool) -> Body:
        if fetched:
            message = "Request processing"
            return {"status": "processing", "message": message, "output": "", "tip": ""}
        message = "Try to fetch request after seconds estimated"
        return responses.processing(job, fetch_result, message)

    def failed(self, job: job_pb2.Job) -> Body:
        return {"status": "failed", "id": job.id, "message": "Failed, Try Again", "output": ""}


def _sentence(error: RequestError) -> str:
    if sentence := sentences.error_sentence(error.reason, error.metadata):
        return sentence
    return error.message if error.reason in sentences.OURS else error.kind.message


def _by_field(sentences: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, sentence in sentences:
        found.setdefault(name, []).append(sentence)
    return found


def retry_headers(error: RequestError) -> dict[str, str]:
    """Returns the headers of the error, with Retry-After if the caller may try again later."""
    has_retry = error.kind in (ErrorKind.RATE_LIMIT, ErrorKind.UNAVAILABLE)
    return error.headers | ({"Retry-After": str(error.retry_seconds)} if has_retry else {})
