"""The two forms in which the contract's answers are given: today's, and `legacy` (section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import results, sentences
from img2img_server.domain.violations import Violation
from img2img_server.gateway.modelslab import responses
from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError

TIP = "Send the API key that the operator of this service gave you."
TIPS = "Wait for your queued requests to finish, or ask the operator for a higher limit."


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to the caller."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


class ResponseFormat(Protocol):
    """One form of every answer. `fetched`: it answers a fetch, not the POST that made the job."""

    def refused(self, why: RequestError) -> Answer:
        """Section 6.4, and fetch of an unknown job."""
        ...

    def success(self, job: job_pb2.Job, output: Sequence[str], *, fetched: bool) -> Answer:
        """Section 6.1."""
        ...

    def processing(self, job: job_pb2.Job, fetch_result: str, *, fetched: bool) -> Answer:
        """Section 6.2."""
        ...

    def failed(self, job: job_pb2.Job) -> Answer:
        """Section 6.3: HTTP 200, the question could be answered."""
        ...


class Current:
    """Real HTTP codes, one `message`, a `reason` as over gRPC."""

    def refused(self, why: RequestError) -> Answer:
        named = [replace(v, message=sentences.field_sentence(v)) for v in why.violations]
        message = sentences.error_sentence(why.reason, why.metadata) or why.message
        return self._refused(why, named[0].message if named else message, named)

    def _refused(self, why: RequestError, message: str, violations: Sequence[Violation]) -> Answer:
        body: dict[str, Any] = {"status": "error", "message": message, "reason": why.reason}
        if violations:
            body["errors"] = _by_field([(v.field, v.text) for v in violations])
        if why.case is ErrorKind.RATE_LIMIT:
            body["retry_after"] = why.retry_seconds
        return Answer(why.case.status, body, _headers(why))

    def success(self, job: job_pb2.Job, output: Sequence[str], *, fetched: bool) -> Answer:
        return Answer(200, responses.success(job, output))

    def processing(self, job: job_pb2.Job, fetch_result: str, *, fetched: bool) -> Answer:
        message = "Your request is being processed"
        return Answer(200, responses.processing(job, fetch_result, message))

    def failed(self, job: job_pb2.Job) -> Answer:
        message = results.failure(job)
        return Answer(200, {"status": "failed", "id": job.id, "message": message, "output": []})


class Plain(Current):
    """Refusals of /v1: as the contract's, in our own words."""

    def refused(self, why: RequestError) -> Answer:
        return self._refused(why, why.message, why.violations)


class Legacy:
    """HTTP 200 always (unknown routes and wrong methods apart), `messege`, short fetches."""

    def refused(self, why: RequestError) -> Answer:
        if why.case is ErrorKind.UNKNOWN_JOB:
            body = {"status": "failed", "id": "", "message": why.message, "output": "", "tip": ""}
            return Answer(200, body)
        message, extra = self._wording(why)
        kept = why.case in (ErrorKind.NO_ROUTE, ErrorKind.WRONG_METHOD)
        return Answer(
            why.case.status if kept else 200,
            {"status": "error", "message": message, "messege": message, **extra},
            _headers(why),
        )

    def success(self, job: job_pb2.Job, output: Sequence[str], *, fetched: bool) -> Answer:
        body = responses.success(job, output)
        if fetched:
            body = {name: body[name] for name in ("status", "id", "output", "proxy_links")}
        return Answer(200, body)

    def processing(self, job: job_pb2.Job, fetch_result: str, *, fetched: bool) -> Answer:
        if fetched:
            message = "Request processing"
            return Answer(
                200, {"status": "processing", "message": message, "output": "", "tip": ""}
            )
        message = "Try to fetch request after seconds estimated"
        return Answer(200, responses.processing(job, fetch_result, message))

    def failed(self, job: job_pb2.Job) -> Answer:
        message = "Failed, Try Again"
        return Answer(200, {"status": "failed", "id": job.id, "message": message, "output": ""})

    def _wording(self, why: RequestError) -> tuple[Any, dict[str, Any]]:
        if why.violations:
            told = [(v.field, sentences.legacy_field_sentence(v)) for v in why.violations]
            return _by_field(told), {}
        if why.case is ErrorKind.BAD_KEY:
            return "Invalid Api Key", {"tip": TIP}
        if why.case is ErrorKind.RATE_LIMIT:
            return ErrorKind.RATE_LIMIT.message, {"tips": TIPS, "retry_after": why.retry_seconds}
        return sentences.error_sentence(why.reason, why.metadata) or why.message, {}


def _by_field(told: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, sentence in told:
        found.setdefault(name, []).append(sentence)
    return found


def _headers(why: RequestError) -> dict[str, str]:
    headers = dict(why.headers)
    if why.case in (ErrorKind.RATE_LIMIT, ErrorKind.UNAVAILABLE):
        headers["Retry-After"] = str(why.retry_seconds)
    return headers
