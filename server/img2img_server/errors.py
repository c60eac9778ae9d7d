"""Every error that a caller can get. Its class sets the status, the reason and whether to retry.

ServiceError
├── InvalidRequestError        INVALID_ARGUMENT     INVALID_REQUEST      lists all fields
├── MalformedRequestError      INVALID_ARGUMENT     MALFORMED_REQUEST
├── UnauthenticatedError       UNAUTHENTICATED      INVALID_API_KEY
├── StreamTokenExpiredError    UNAUTHENTICATED      STREAM_TOKEN_EXPIRED
├── PermissionDeniedError      PERMISSION_DENIED    PERMISSION_DENIED
├── JobNotFoundError           NOT_FOUND            JOB_NOT_FOUND
├── ModelNotFoundError         NOT_FOUND            MODEL_NOT_FOUND
├── UploadNotFoundError        NOT_FOUND            UPLOAD_NOT_FOUND
├── UploadExpiredError         NOT_FOUND            UPLOAD_EXPIRED
├── RequestIdReusedError       ALREADY_EXISTS       REQUEST_ID_REUSED
├── JobEndedError              FAILED_PRECONDITION  JOB_ENDED
├── JobNotEndedError           FAILED_PRECONDITION  JOB_NOT_ENDED
├── NoWebhookError             FAILED_PRECONDITION  NO_WEBHOOK
├── DeadlineTooShortError      FAILED_PRECONDITION  DEADLINE_TOO_SHORT   retry, if that can help
├── NoCatalogueError           FAILED_PRECONDITION  NO_CATALOGUE
├── StorageKeysMissingError    FAILED_PRECONDITION  STORAGE_KEYS_MISSING
├── StreamTokenKeysMissingError FAILED_PRECONDITION STREAM_TOKEN_KEYS_MISSING
├── UploadIncompleteError      FAILED_PRECONDITION  UPLOAD_INCOMPLETE
├── UploadsDisabledError       FAILED_PRECONDITION  UPLOADS_DISABLED
├── MessageTooLargeError       FAILED_PRECONDITION  MESSAGE_TOO_LARGE
├── QueueFullError             RESOURCE_EXHAUSTED   QUEUE_FULL           retry
├── UploadsFullError           RESOURCE_EXHAUSTED   UPLOADS_FULL         retry
├── RateLimitedError           RESOURCE_EXHAUSTED   RATE_LIMITED         retry
├── RequestTooLargeError       RESOURCE_EXHAUSTED   REQUEST_TOO_LARGE
├── TooManyCallsError          RESOURCE_EXHAUSTED   TOO_MANY_CALLS       retry
├── TooManyWatchersError       RESOURCE_EXHAUSTED   TOO_MANY_WATCHERS    retry
├── TooManyWebhooksError       RESOURCE_EXHAUSTED   TOO_MANY_WEBHOOKS    retry
├── ServerBusyError            RESOURCE_EXHAUSTED   SERVER_BUSY          retry
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
├── QueueExpiredError          QUEUE_EXPIRED        retry
└── EngineError                ENGINE_FAILED
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, dataclass_transform

from img2img_server.domain.violations import SHOWN_CHARACTERS, Violation

DOMAIN = "img2img.v1"
_NEEDED_FOR = {
    "operate": "manage the server",
    "storage": "change storage settings",
    "unsafe": "turn the safety checker off",
}


class OperatorError(Exception):
    """A process cannot start or continue. The message has the reason and the required change, so no
    traceback is needed.
    """


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


@dataclass_transform(eq_default=False)
class ServiceError(Exception):
    """Root of the errors of RPCs. A subclass is a dataclass; its fields fill its sentence."""

    code: ClassVar[Code] = Code.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    sentence: ClassVar[str] = ""
    retry_seconds: float | None = None

    def __init_subclass__(cls) -> None:
        dataclass(eq=False, repr=False)(cls)

    def __str__(self) -> str:
        return self.sentence.format_map(self._values())

    @property
    def metadata(self) -> dict[str, str]:
        """Returns every value that the message names (AIP-193)."""
        return {name: str(value) for name, value in self._values().items()}

    def _values(self) -> dict[str, Any]:
        names = (field.name for field in fields(self))  # type: ignore[arg-type] # of a subclass
        return {name: getattr(self, name) for name in names if name != "retry_seconds"}


class InvalidRequestError(ServiceError):
    """The request breaks rules; `violations` lists all of them."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"
    violations: list[Violation]

    def __str__(self) -> str:
        return "; ".join(violation.text for violation in self.violations)

    @property
    def metadata(self) -> dict[str, str]:
        """Returns the names of the fields, and each violation's values as "{field}_{name}"."""
        names = ",".join(dict.fromkeys(violation.field for violation in self.violations))
        return {"fields": names} | {
            f"{violation.field}_{name}": value
            for violation in self.violations
            for name, value in {**violation.values, "cause": violation.cause}.items()
            if value
        }


class MalformedRequestError(ServiceError):
    """The bytes of the request are no message of the method's type, or the call has no request."""

    code = Code.INVALID_ARGUMENT
    reason = "MALFORMED_REQUEST"
    sentence = "the request is not a message of the type that this method takes"


class UnauthenticatedError(ServiceError):
    """The API key is unknown."""

    code = Code.UNAUTHENTICATED
    reason = "INVALID_API_KEY"
    sentence = "The API key is wrong: this service has no such key"


class ApiKeyMissingError(ServiceError):
    """The call has no API key."""

    code = Code.UNAUTHENTICATED
    reason = "INVALID_API_KEY"
    sentence = "No API key was sent: send it as the metadata authorization: Bearer KEY"


class StreamTokenInvalidError(ServiceError):
    """A text that begins like a token of an event stream is no valid token of the call."""

    code = Code.UNAUTHENTICATED
    reason = "INVALID_API_KEY"
    sentence = (
        "The token is wrong: a token opens the event stream of one job and no other call, and the "
        "key that made it must be valid"
    )


class ApiKeyExpiredError(ServiceError):
    """The API key was valid once."""

    code = Code.UNAUTHENTICATED
    reason = "API_KEY_EXPIRED"
    sentence = "The API key has expired: ask the operator for a new one"


class StreamTokenExpiredError(ServiceError):
    """The token of an event stream was valid once."""

    code = Code.UNAUTHENTICATED
    reason = "STREAM_TOKEN_EXPIRED"
    sentence = "The token of this event stream has expired: create another one"


class PermissionDeniedError(ServiceError):
    """The key lacks a permission that the call needs."""

    code = Code.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"
    permission: str

    def __str__(self) -> str:
        action = _NEEDED_FOR[self.permission]
        return f"This key may not {action}: it lacks the permission {self.permission}"


class JobNotFoundError(ServiceError):
    """The tenant has no such job, or the job has expired."""

    code = Code.NOT_FOUND
    reason = "JOB_NOT_FOUND"
    sentence = (
        "{name} was not found: its id is wrong, it is one of another tenant, or it has expired"
    )
    name: str

    def _values(self) -> dict[str, Any]:
        return {"name": self.name[:SHOWN_CHARACTERS]}


class UploadNotFoundError(ServiceError):
    """The tenant has no such upload."""

    code = Code.NOT_FOUND
    reason = "UPLOAD_NOT_FOUND"
    sentence = (
        "There is no upload {upload}: its id is wrong, it is one of another tenant, or it has "
        "expired"
    )
    upload: str

    def _values(self) -> dict[str, Any]:
        return {"upload": self.upload[:SHOWN_CHARACTERS]}


class UploadExpiredError(ServiceError):
    """The upload existed, and its time is over."""

    code = Code.NOT_FOUND
    reason = "UPLOAD_EXPIRED"
    sentence = "The upload {upload} has expired: create it again"
    upload: str


class UploadIncompleteError(ServiceError):
    """The file of the upload was not sent to its URL yet."""

    code = Code.FAILED_PRECONDITION
    reason = "UPLOAD_INCOMPLETE"
    sentence = "The file of the upload {upload} was not sent yet: send it to its URL with PUT"
    upload: str


class UploadsDisabledError(ServiceError):
    """IMG2IMG_UPLOAD_BYTES is 0."""

    code = Code.FAILED_PRECONDITION
    reason = "UPLOADS_DISABLED"
    sentence = "This server takes no uploads: its operator must set IMG2IMG_UPLOAD_BYTES"


class UploadsFullError(ServiceError):
    """The uploads of the tenant have their largest size or number together.

    `retry_seconds`: the time until the first one expires.
    """

    code = Code.RESOURCE_EXHAUSTED
    reason = "UPLOADS_FULL"
    sentence = "the tenant's uploads may have {most_bytes} bytes in {most_uploads} files together"
    most_bytes: int
    most_uploads: int
    retry_seconds: float | None = None


class ModelNotFoundError(ServiceError):
    """No worker has announced this model within the stated time, but other models."""

    code = Code.NOT_FOUND
    reason = "MODEL_NOT_FOUND"
    model: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.known) or "none yet"
        return f"model {self._values()['model']!r} is not served here; known models: {names}"

    def _values(self) -> dict[str, Any]:
        return {"model": self.model[:SHOWN_CHARACTERS], "known": ",".join(self.known)}


class NoCatalogueError(ServiceError):
    """The workers of a model serve only this model."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_CATALOGUE"
    sentence = (
        "no worker of model {model!r} has a catalogue (IMG2IMG_MODELS_FILE), so it is always loaded"
    )
    model: str


class RequestIdReusedError(ServiceError):
    """The request_id belongs to a different request."""

    code = Code.ALREADY_EXISTS
    reason = "REQUEST_ID_REUSED"
    sentence = "request_id {request_id} was used for a different request"
    request_id: str


class JobEndedError(ServiceError):
    """The job has already succeeded or failed."""

    code = Code.FAILED_PRECONDITION
    reason = "JOB_ENDED"
    sentence = "{name} has already {state}"
    name: str
    state: str


class JobNotEndedError(ServiceError):
    """The call needs a job that has ended."""

    code = Code.FAILED_PRECONDITION
    reason = "JOB_NOT_ENDED"
    sentence = "{name} has not ended, it is {state}"
    name: str
    state: str


class NoWebhookError(ServiceError):
    """The job has no webhook."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_WEBHOOK"
    sentence = "{name} has no webhook"
    name: str


class DeadlineTooShortError(ServiceError):
    """The estimate says that the job cannot finish within the caller's deadline.

    `wait_seconds`: the part of needed_seconds that the job waits for other jobs.
    """

    code = Code.FAILED_PRECONDITION
    reason = "DEADLINE_TOO_SHORT"
    sentence = "the deadline leaves {remaining_seconds} s, the job needs about {needed_seconds} s"
    remaining_seconds: float
    needed_seconds: float
    wait_seconds: float = 0.0

    def __post_init__(self) -> None:
        missing = self.needed_seconds - self.remaining_seconds
        # A retry helps only if the wait for other jobs is the cause.
        self.retry_seconds = max(1.0, missing) if missing <= self.wait_seconds else None

    def _values(self) -> dict[str, Any]:
        names = ("remaining_seconds", "needed_seconds")
        return {name: f"{getattr(self, name):.1f}" for name in names}


class StorageKeysMissingError(ServiceError):
    """IMG2IMG_STORAGE_KEYS is not configured, so storage settings cannot be encrypted."""

    code = Code.FAILED_PRECONDITION
    reason = "STORAGE_KEYS_MISSING"
    sentence = "This server cannot keep S3 details: its operator must set IMG2IMG_STORAGE_KEYS"


class StreamTokenKeysMissingError(ServiceError):
    """IMG2IMG_STREAM_TOKEN_KEYS is not configured, so tokens cannot be signed."""

    code = Code.FAILED_PRECONDITION
    reason = "STREAM_TOKEN_KEYS_MISSING"
    sentence = (
        "This server makes no tokens of event streams: its operator must set "
        "IMG2IMG_STREAM_TOKEN_KEYS"
    )


class MessageTooLargeError(ServiceError):
    """The job or event is larger than the largest message of the NATS server."""

    code = Code.FAILED_PRECONDITION
    reason = "MESSAGE_TOO_LARGE"
    sentence = (
        "The job is larger than this server's queue takes; its operator must raise max_payload of "
        "NATS"
    )


class QueueFullError(ServiceError):
    """The tenant has its limit of unfinished jobs.

    `retry_seconds`: the time until a job is expected to end; None: unknown, so callers get half a
    minute.
    """

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    sentence = "the tenant already has {limit} unfinished jobs, which is its limit"
    limit: int
    retry_seconds: float | None = None

    def __post_init__(self) -> None:
        self.retry_seconds = 30.0 if self.retry_seconds is None else self.retry_seconds


class RateLimitedError(ServiceError):
    """The key creates jobs too fast."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "RATE_LIMITED"
    sentence = "the API key may not create more than {per_minute} jobs per minute"
    per_minute: int
    retry_seconds: float | None


class RequestTooLargeError(ServiceError):
    """The request of a method that takes small requests only is too large."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "REQUEST_TOO_LARGE"
    sentence = "the request of this method must not be larger than {limit} bytes"
    limit: int


class TooManyCallsError(ServiceError):
    """The tenant has its limit of open calls at this server."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_CALLS"
    sentence = "the tenant already has {limit} open calls, which is its limit"
    limit: int
    retry_seconds = 1.0


class TooManyWatchersError(ServiceError):
    """This server has its limit of open streams."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_WATCHERS"
    sentence = "this server already has {limit} open streams, which is its limit"
    limit: int
    retry_seconds = 5.0


class TooManyWebhooksError(ServiceError):
    """The tenant has its limit of undelivered webhooks."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_WEBHOOKS"
    sentence = "the tenant has too many webhooks that are not delivered yet"
    retry_seconds = 60.0


class ServerBusyError(ServiceError):
    """A bounded resource of this server is in use, see budget.py. `resource`: its name."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "SERVER_BUSY"
    sentence = "this server has no room for the request now: its {resource} are in use"
    resource: str
    retry_seconds: float | None = 1.0


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

    def __str__(self) -> str:
        return str(self.args[0])


class NoModelError(ServiceError):
    """No worker has announced a model that can serve the request.

    `model`: the default or the requested model; `known`: the other models.
    """

    code = Code.UNAVAILABLE
    reason = "NO_MODEL"
    retry_seconds = 5.0
    model: str = ""
    known: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.known:
            return "No model is loaded yet; try again once a worker has loaded one"
        names, model = ", ".join(self.known), self.metadata["model"]
        return f"The default model {model!r} is not loaded yet; known models: {names}"

    def _values(self) -> dict[str, Any]:
        return {"model": self.model[:SHOWN_CHARACTERS]}


class InternalError(ServiceError):
    """An unexpected error. The log has its cause under `error_id`."""

    sentence = "internal error {error_id}: the operator finds its cause in the log under this id"
    error_id: str


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
    """A requested safety check cannot run. The check is never skipped silently."""

    reason = "SAFETY_CHECK_UNAVAILABLE"


class StorageError(JobFailedError):
    """The object store rejected the result, also after retries.

    `detail`: the setting to correct and the host, for the operator and not for callers. `final`:
    the store refuses permanently, for example because a permission is missing.
    """

    reason = "STORAGE_UNAVAILABLE"
    retryable = True

    def __init__(self, sentence: str = "", detail: str = "", *, final: bool = False) -> None:
        super().__init__(sentence)
        self.detail = detail
        self.final = final


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


class QueueExpiredError(JobFailedError):
    """The job has waited for as long as the service keeps jobs."""

    reason = "QUEUE_EXPIRED"
    retryable = True

    def __init__(self, hours: int) -> None:
        super().__init__(f"no worker completed the job within {hours} hours of its acceptance")
        self.hours = hours


class EngineError(JobFailedError):
    """The engine failed on this job; the log has the cause."""
