"""Every error that a caller can get. Its class sets the status, the reason and whether to retry.

ServiceError
├── InvalidRequestError        INVALID_ARGUMENT     INVALID_REQUEST      lists all fields
├── UnauthenticatedError       UNAUTHENTICATED      INVALID_API_KEY
├── PermissionDeniedError      PERMISSION_DENIED    PERMISSION_DENIED
├── JobNotFoundError           NOT_FOUND            JOB_NOT_FOUND
├── ModelNotFoundError         NOT_FOUND            MODEL_NOT_FOUND
├── RequestIdReusedError       ALREADY_EXISTS       REQUEST_ID_REUSED
├── JobEndedError              FAILED_PRECONDITION  JOB_ENDED
├── JobNotEndedError           FAILED_PRECONDITION  JOB_NOT_ENDED
├── NoWebhookError             FAILED_PRECONDITION  NO_WEBHOOK
├── DeadlineTooShortError      FAILED_PRECONDITION  DEADLINE_TOO_SHORT   retry, if that can help
├── StorageKeysMissingError    FAILED_PRECONDITION  STORAGE_KEYS_MISSING
├── MessageTooLargeError       FAILED_PRECONDITION  MESSAGE_TOO_LARGE
├── QueueFullError             RESOURCE_EXHAUSTED   QUEUE_FULL           retry
├── RateLimitedError           RESOURCE_EXHAUSTED   RATE_LIMITED         retry
├── TooManyCallsError          RESOURCE_EXHAUSTED   TOO_MANY_CALLS       retry
├── TooManyWatchersError       RESOURCE_EXHAUSTED   TOO_MANY_WATCHERS    retry
├── TooManyWebhooksError       RESOURCE_EXHAUSTED   TOO_MANY_WEBHOOKS    retry
├── UnavailableError           UNAVAILABLE          UNAVAILABLE          retry
├── NoModelError               UNAVAILABLE          NO_MODEL             retry
└── InternalError              INTERNAL             INTERNAL             logged with its id
JobFailedError: the job fails while it runs; becomes Job.error, not a status
├── OutOfMemoryError           OUT_OF_MEMORY
├── InitImageError             INIT_IMAGE_INVALID
├── SafetyCheckError           SAFETY_CHECK_UNAVAILABLE
├── StorageError               STORAGE_UNAVAILABLE  retry
├── AttemptsExhaustedError     ATTEMPTS_EXHAUSTED
├── QueueClearedError          QUEUE_CLEARED
└── EngineError                ENGINE_FAILED
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

from img2img_server.domain.violations import Violation

DOMAIN = "img2img.v1"


class OperatorError(Exception):
    """A process cannot start or continue. The message says why and what the operator must change,
    so that no traceback is needed."""


class Code(Enum):
    """google.rpc.Code numbers of the statuses we use."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class ServiceError(Exception):
    """Root of the errors of RPCs."""

    code: ClassVar[Code] = Code.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    retry_seconds: float | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Returns every value that the message names (AIP-193)."""
        return {}


class InvalidRequestError(ServiceError):
    """The request breaks rules; `violations` lists all of them."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(violation.text for violation in violations))
        self.violations = violations

    @property
    def metadata(self) -> dict[str, str]:
        """Returns the names of the fields, and each violation's values as "{field}_{name}"."""
        fields = ",".join(dict.fromkeys(violation.field for violation in self.violations))
        return {"fields": fields} | {
            f"{violation.field}_{name}": value
            for violation in self.violations
            for name, value in {**violation.values, "cause": violation.cause}.items()
            if value
        }


class UnauthenticatedError(ServiceError):
    """The API key is missing or unknown."""

    code = Code.UNAUTHENTICATED
    reason = "INVALID_API_KEY"

    def __init__(self) -> None:
        super().__init__("Invalid API key")


_NEEDED_FOR = {
    "operate": "manage the server",
    "storage": "change storage settings",
    "unsafe": "turn the safety checker off",
}


class PermissionDeniedError(ServiceError):
    """The key lacks a permission that the call needs."""

    code = Code.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"

    def __init__(self, permission: str) -> None:
        action = _NEEDED_FOR[permission]
        super().__init__(f"This key may not {action}: it lacks the permission {permission}")
        self.permission = permission

    @property
    def metadata(self) -> dict[str, str]:
        return {"permission": self.permission}


class JobNotFoundError(ServiceError):
    """The tenant has no such job, or the job has expired."""

    code = Code.NOT_FOUND
    reason = "JOB_NOT_FOUND"

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} does not exist or has expired")
        self.name = name

    @property
    def metadata(self) -> dict[str, str]:
        return {"name": self.name}


class ModelNotFoundError(ServiceError):
    """No worker ever announced this model, but other models."""

    code = Code.NOT_FOUND
    reason = "MODEL_NOT_FOUND"

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        names = ", ".join(known) or "none yet"
        model = model[:64]  # what a caller sent, and a status has room for
        super().__init__(f"model {model!r} is not served here; known models: {names}")
        self.model = model
        self.known = known

    @property
    def metadata(self) -> dict[str, str]:
        return {"model": self.model, "known": ",".join(self.known)}


class RequestIdReusedError(ServiceError):
    """The request_id belongs to a different request."""

    code = Code.ALREADY_EXISTS
    reason = "REQUEST_ID_REUSED"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {request_id} was used for a different request")
        self.request_id = request_id

    @property
    def metadata(self) -> dict[str, str]:
        return {"request_id": self.request_id}


class JobEndedError(ServiceError):
    """The job has already succeeded or failed."""

    code = Code.FAILED_PRECONDITION
    reason = "JOB_ENDED"

    def __init__(self, name: str, state: str) -> None:
        super().__init__(f"{name} has already {state}")
        self.name = name
        self.state = state

    @property
    def metadata(self) -> dict[str, str]:
        return {"name": self.name, "state": self.state}


class JobNotEndedError(ServiceError):
    """The call needs a job that has ended."""

    code = Code.FAILED_PRECONDITION
    reason = "JOB_NOT_ENDED"

    def __init__(self, name: str, state: str) -> None:
        super().__init__(f"{name} has not ended, it is {state}")
        self.name = name
        self.state = state

    @property
    def metadata(self) -> dict[str, str]:
        return {"name": self.name, "state": self.state}


class NoWebhookError(ServiceError):
    """The job has no webhook."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_WEBHOOK"

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} has no webhook")
        self.name = name

    @property
    def metadata(self) -> dict[str, str]:
        return {"name": self.name}


class DeadlineTooShortError(ServiceError):
    """The estimate says that the job cannot finish within the caller's deadline."""

    code = Code.FAILED_PRECONDITION
    reason = "DEADLINE_TOO_SHORT"

    def __init__(
        self, remaining_seconds: float, needed_seconds: float, wait_seconds: float = 0.0
    ) -> None:
        """`wait_seconds`: the part of needed_seconds that the job waits for other jobs."""
        super().__init__(
            f"the deadline leaves {remaining_seconds:.1f} s, the job needs about "
            f"{needed_seconds:.1f} s"
        )
        self.remaining_seconds = remaining_seconds
        self.needed_seconds = needed_seconds
        missing_seconds = needed_seconds - remaining_seconds
        # Waiting helps only against the wait for other jobs.
        self.retry_seconds = max(1.0, missing_seconds) if missing_seconds <= wait_seconds else None

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "remaining_seconds": f"{self.remaining_seconds:.1f}",
            "needed_seconds": f"{self.needed_seconds:.1f}",
        }


class StorageKeysMissingError(ServiceError):
    """IMG2IMG_STORAGE_KEYS is not configured, so storage settings cannot be encrypted."""

    code = Code.FAILED_PRECONDITION
    reason = "STORAGE_KEYS_MISSING"

    def __init__(self) -> None:
        super().__init__(
            "This server cannot keep S3 details: its operator must set IMG2IMG_STORAGE_KEYS"
        )


class MessageTooLargeError(ServiceError):
    """The job or event is larger than the largest message of the NATS server."""

    code = Code.FAILED_PRECONDITION
    reason = "MESSAGE_TOO_LARGE"

    def __init__(self) -> None:
        super().__init__(
            "The job is larger than this server's queue takes; its operator must raise "
            "max_payload of NATS"
        )


class QueueFullError(ServiceError):
    """The tenant has its limit of unfinished jobs."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(self, limit: int, retry_seconds: float | None = None) -> None:
        """`retry_seconds`: until a place is expected; None: unknown, then half a minute."""
        super().__init__(f"the tenant already has {limit} unfinished jobs, which is its limit")
        self.limit = limit
        self.retry_seconds = 30.0 if retry_seconds is None else retry_seconds

    @property
    def metadata(self) -> dict[str, str]:
        return {"limit": str(self.limit)}


class RateLimitedError(ServiceError):
    """The key creates jobs too fast."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "RATE_LIMITED"

    def __init__(self, per_minute: int, retry_seconds: float) -> None:
        super().__init__(f"the API key may not create more than {per_minute} jobs per minute")
        self.per_minute = per_minute
        self.retry_seconds = retry_seconds

    @property
    def metadata(self) -> dict[str, str]:
        return {"per_minute": str(self.per_minute)}


class TooManyCallsError(ServiceError):
    """The tenant has its limit of open calls at this server."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_CALLS"
    retry_seconds = 1.0

    def __init__(self, limit: int) -> None:
        super().__init__(f"the tenant already has {limit} open calls, which is its limit")
        self.limit = limit

    @property
    def metadata(self) -> dict[str, str]:
        return {"limit": str(self.limit)}


class TooManyWatchersError(ServiceError):
    """This server has its limit of open streams."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_WATCHERS"
    retry_seconds = 5.0

    def __init__(self, limit: int) -> None:
        super().__init__(f"this server already has {limit} open streams, which is its limit")
        self.limit = limit

    @property
    def metadata(self) -> dict[str, str]:
        return {"limit": str(self.limit)}


class TooManyWebhooksError(ServiceError):
    """The tenant has its limit of undelivered webhooks."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_WEBHOOKS"
    retry_seconds = 60.0

    def __init__(self) -> None:
        super().__init__("the tenant has too many webhooks that are not delivered yet")


class UnavailableError(ServiceError):
    """The service, its queue or its store is down or stopping.

    `detail`: the setting to correct and the host, for the operator and not for callers.
    """

    code = Code.UNAVAILABLE
    reason = "UNAVAILABLE"
    retry_seconds = 1.0

    def __init__(
        self, sentence: str = "the service is temporarily unavailable", detail: str = ""
    ) -> None:
        super().__init__(sentence)
        self.detail = detail


class NoModelError(ServiceError):
    """No worker has announced a model that can serve the request."""

    code = Code.UNAVAILABLE
    reason = "NO_MODEL"
    retry_seconds = 5.0

    def __init__(self, model: str = "", known: tuple[str, ...] = ()) -> None:
        """`model`: the default or the requested model; `known`: the other models."""
        self.model = model[:64]
        sentence = "No model is loaded yet; try again once a worker has loaded one"
        if known:
            names = ", ".join(known)
            sentence = f"The default model {self.model!r} is not loaded yet; known models: {names}"
        super().__init__(sentence)

    @property
    def metadata(self) -> dict[str, str]:
        return {"model": self.model}


class InternalError(ServiceError):
    """An unexpected error; the log has it under `error_id`."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}")
        self.error_id = error_id

    @property
    def metadata(self) -> dict[str, str]:
        return {"error_id": self.error_id}


class JobFailedError(Exception):
    """Root of the errors that end a job. The message names no path, host or stack."""

    reason: ClassVar[str] = "ENGINE_FAILED"
    retryable: ClassVar[bool] = False


class OutOfMemoryError(JobFailedError):
    """A single sample does not fit the device."""

    reason = "OUT_OF_MEMORY"

    def __init__(self, width: int, height: int, needed_bytes: int | None = None) -> None:
        need = f" (needs about {needed_bytes / 2**20:.0f} MiB)" if needed_bytes else ""
        super().__init__(f"out of memory at {width}x{height}{need}")
        self.width = width
        self.height = height
        self.needed_bytes = needed_bytes


class InitImageError(JobFailedError):
    """The init image could not be prepared."""

    reason = "INIT_IMAGE_INVALID"


class SafetyCheckError(JobFailedError):
    """A requested safety check cannot run; it is never skipped silently."""

    reason = "SAFETY_CHECK_UNAVAILABLE"


class StorageError(JobFailedError):
    """The object store rejected the result, also after retries.

    `detail`: the setting to correct and the host, for the operator and not for callers.
    """

    reason = "STORAGE_UNAVAILABLE"
    retryable = True

    def __init__(self, sentence: str = "", detail: str = "") -> None:
        super().__init__(sentence)
        self.detail = detail


class AttemptsExhaustedError(JobFailedError):
    """Every worker that ran the job was lost."""

    reason = "ATTEMPTS_EXHAUSTED"

    def __init__(self, attempts: int) -> None:
        super().__init__(f"the job failed after {attempts} attempts")
        self.attempts = attempts


class QueueClearedError(JobFailedError):
    """ClearQueue ended the job while it waited."""

    reason = "QUEUE_CLEARED"

    def __init__(self) -> None:
        super().__init__("the queue was cleared before the job started")


class EngineError(JobFailedError):
    """The engine failed on this job; the log has the cause."""
