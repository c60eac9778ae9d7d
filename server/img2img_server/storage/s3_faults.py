"""Sentences for the errors of S3 stores, each with the setting to correct."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final
from xml.etree import ElementTree as ET

import urllib3
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from img2img_server.certificates import refused_certificate
from img2img_server.storage.s3_access import BUCKET, ENDPOINT, REGION, S3Access
from img2img_server.storage.s3_credentials import CredentialsError

# All errors of the SDK. It raises ValueError for a wrong argument and for a malformed response.
FAULTS: Final = (
    CredentialsError,
    MinioException,
    urllib3.exceptions.HTTPError,
    OSError,
    ET.ParseError,
    ValueError,
)
MISSING: Final = frozenset({"NoSuchKey", "NoSuchObject", "NoSuchBucket"})
DENIED: Final = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden"})
# Error codes of transient failures; any other refusal is final.
_TRANSIENT: Final = frozenset(
    {
        *("InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"),
        *("ServerBusy", "TooManyRequests", "Throttling", "ThrottlingException"),
    }
)
_UNKNOWN_KEY: Final = frozenset(
    {"InvalidAccessKeyId", "NotSignedUp", "UnrecognizedClientException"}
)
_TOKEN: Final = frozenset(
    {"InvalidToken", "ExpiredToken", "TokenRefreshRequired", "InvalidSecurityToken"}
)
_SKEWED: Final = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
_REGION: Final = frozenset(
    {
        *("AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "Redirect"),
        *("MovedPermanently", "IllegalLocationConstraintException", "InvalidLocationConstraint"),
        *("InvalidRegion", "RetryHead"),
    }
)


@dataclass(frozen=True, slots=True)
class StoreFault:
    """Why the store cannot be used. `final`: another attempt would fail too."""

    setting: str
    sentence: str
    final: bool

    def __str__(self) -> str:
        return f"{self.setting}: {self.sentence}"


class NotAStoreError(MinioException):
    """The server is no S3 store; the sentence says how its response differs."""


class NoBucketError(MinioException):
    """The bucket is missing and cannot be created."""


def is_transient(error: BaseException) -> bool:
    """Returns whether the same call may succeed a moment later."""
    match error:
        case S3Error():
            return error.code in _TRANSIENT
        case CredentialsError():
            return not error.final
        case NotAStoreError() | NoBucketError() | ET.ParseError():
            return False
        case InvalidResponseError():
            return _may_pass(_status(error))
        case ServerError():
            return _may_pass(error.status_code)
        case urllib3.exceptions.LocationParseError():
            return False
        case urllib3.exceptions.HTTPError() | OSError():
            return not isinstance(_tls(error), ssl.SSLError)
        case _:
            return False


def clock_skew(headers: Mapping[str, str]) -> float | None:
    """Returns the local time minus the time of a response, which has whole seconds. None if the
    response has no date.
    """
    try:
        sent = parsedate_to_datetime(headers.get("date", ""))
    except ValueError:
        return None
    return time.time() - sent.timestamp() - 0.5


def is_repeatable_refusal(error: BaseException) -> bool:
    """Returns whether the store refused a call for a transient reason with a status of which the
    SDK repeats nothing, for example 400 RequestTimeout or 409 OperationAborted.
    """
    return (
        isinstance(error, S3Error)
        and is_transient(error)
        and error.response is not None
        and not _may_pass(error.response.status)
    )


def _may_pass(status: int) -> bool:
    return status == 429 or (status >= 500 and status != 501)  # HTTP 501: not implemented


def explain(error: BaseException | None, access: S3Access) -> StoreFault:
    """Explains an error to the operator; the sentence names the host, but no key."""
    where = f"the store at {access.host}"
    final = error is not None and not is_transient(error)
    match error:
        case CredentialsError():
            return StoreFault(error.setting, str(error), error.final)
        case NoBucketError():
            why = f"the bucket {access.bucket} does not exist, and {error}"
            return StoreFault(BUCKET, why, final)
        case S3Error():
            setting, why = _refusal(error, access)
            return StoreFault(setting, f"{where} {why}", final)
        case NotAStoreError():
            why = f"{access.host} {error}: it is no S3 endpoint"
            return StoreFault(ENDPOINT, why, final)
        case InvalidResponseError():
            if "HTTPS" in str(error):
                return StoreFault(ENDPOINT, f"{where} speaks TLS: write https://", final)
            why = f"{access.host} answered HTTP {_status(error)} and not as an S3 endpoint does"
            return StoreFault(ENDPOINT, why, final)
        case ServerError():
            return StoreFault(ENDPOINT, f"{where} answered HTTP {error.status_code}", final)
        case ET.ParseError():
            why = f"{access.host} answered with XML that is not S3's: it is no S3 endpoint"
            return StoreFault(ENDPOINT, why, final)
        case urllib3.exceptions.HTTPError() | OSError():
            return StoreFault(ENDPOINT, _unreachable(error, access), final)
        case _:
            return StoreFault(ENDPOINT, f"{where} cannot be used: {error}", final)


def _refusal(error: S3Error, access: S3Access) -> tuple[str, str]:
    code, source, bucket = error.code, access.source, access.bucket
    if not code:
        return ENDPOINT, "answered with XML that is not S3's: it is no S3 endpoint"
    if code == "SignatureDoesNotMatch":
        why = "refused the signature (SignatureDoesNotMatch): this is not the access key's secret"
        return source.secret, why
    if code in _UNKNOWN_KEY:
        return source.access, f"does not know the access key ({code})"
    if code in _TOKEN:
        return source.token, f"refused the session token ({code}): it is wrong or has expired"
    if code in DENIED:
        return source.access, f"does not allow it ({code})"
    if code in _SKEWED:
        skew = clock_skew(error.response.headers if error.response else {})
        size = "" if skew is None else f" by {abs(skew):.0f} s"
        why = f"refused the request ({code}): its clock and that of this machine differ{size}"
        return ENDPOINT, why
    if code in _REGION:
        found = error.response.headers.get("x-amz-bucket-region") if error.response else None
        hint = f", which is {found}" if found else ""
        why = f"refused the region {access.region} ({code}): set that of the bucket{hint}"
        return REGION, why
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return BUCKET, f"has no bucket {bucket} ({code})"
    return ENDPOINT, f"refused a request ({code}: {error.message})"


def _status(error: InvalidResponseError) -> int:
    return int(error._code)


def _tls(error: BaseException | None) -> BaseException | None:
    """Returns the TLS error inside an error of urllib3."""
    while error is not None and not isinstance(error, ssl.SSLError):
        inner = getattr(error, "reason", None) or next(iter(getattr(error, "args", ())), None)
        error = inner if isinstance(inner, BaseException) and inner is not error else None
    return error


def _unreachable(error: BaseException, access: S3Access) -> str:
    where, reason = access.host, getattr(error, "reason", None)
    if isinstance(error, urllib3.exceptions.MaxRetryError) and isinstance(reason, BaseException):
        return _unreachable(reason, access)
    match _tls(error):
        case ssl.SSLCertVerificationError() as found:
            return f"{where} {refused_certificate(found, 'SSL_CERT_FILE')}"
        case ssl.SSLError() as found if "WRONG_VERSION_NUMBER" in str(found):
            return f"{where} does not speak TLS: write http://, or another port"
        case ssl.SSLError() as found:
            return f"{where} ended the TLS handshake ({found.reason})"
    match error:
        case urllib3.exceptions.NameResolutionError():
            return f"the name {where} cannot be resolved"
        case urllib3.exceptions.LocationParseError():
            return f"{where} is no host"
        case urllib3.exceptions.NewConnectionError():
            why = str(error).rpartition(": ")[2].rpartition("] ")[2]  # removes "[Errno 111] "
            return f"{where} cannot be reached ({why})"
        case urllib3.exceptions.TimeoutError():
            return f"{where} does not answer in time"
        case urllib3.exceptions.ProtocolError():
            return f"{where} closed the connection without a response"
        case _:
            why = getattr(error, "strerror", "") or type(error).__name__
            return f"{where} cannot be reached ({why})"
