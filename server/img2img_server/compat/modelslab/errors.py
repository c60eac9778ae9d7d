"""The errors of the HTTP contract: docs/http-contract.md#errors."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from img2img_server.domain.violations import Violation

RETRY_SECONDS = 30  # seconds; used if the api gives no estimate


class ErrorKind(Enum):
    """HTTP status, reason and message of every error, as ModelsLab's callers get them. Callers of
    other APIs get the message of the RequestError, which says what to do.
    """

    INVALID_JSON = 400, "INVALID_JSON", "Invalid JSON body"
    FIELDS = 400, "INVALID_REQUEST", ""  # The message is that of the first violation.
    BAD_KEY = 401, "INVALID_API_KEY", "Invalid API key"
    FORBIDDEN = 403, "PERMISSION_DENIED", "This key lacks a permission"
    FOREIGN_PAGE = 403, "ORIGIN_NOT_ALLOWED", "Pages of this origin may not call this service"
    JOB_ENDED = 400, "JOB_ENDED", "The job has already ended"
    UNKNOWN_JOB = 404, "JOB_NOT_FOUND", "Request not found"
    UNKNOWN_UPLOAD = 404, "UPLOAD_NOT_FOUND", "There is no such upload"
    UPLOAD_EXPIRED = 404, "UPLOAD_EXPIRED", "The upload has expired"
    UPLOAD_INCOMPLETE = 409, "UPLOAD_INCOMPLETE", "The file of the upload was not sent yet"
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
    """The gateway rejects the request. Messages are our own; response_formats.py replaces them by
    ModelsLab's.

    Attributes:
        reason: A machine-readable reason. Default: the kind's.
        violations: The broken rules, in the order of the response. Only with the kind FIELDS.
        retry_seconds: Whole seconds until a retry may succeed.
        metadata: The metadata of the api's ErrorInfo.
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
        """Returns the text of the first violation, else the given message, else that of the
        kind.
        """
        return self.violations[0].text if self.violations else self._message
