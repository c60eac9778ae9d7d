"""Translates errors of NATS to errors and sentences of the service."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import nats.errors
import nats.js.errors

from img2img_server.certificates import refused_certificate
from img2img_server.errors import MessageTooLargeError, UnavailableError

# Error codes of the server. 10077 means that storing failed; only the error's text has the reason,
# so tests/contract/test_queue_jobs.py checks the text with the real server.
_WRONG_LAST_SEQUENCE: Final = (10071, 10164)
_STORE_FAILED: Final = 10077
_SUBJECT_FULL: Final = "maximum messages per subject exceeded"
_STREAM_FULL: Final = "maximum messages exceeded"
_MESSAGE_TOO_LARGE: Final = "message too large"  # for a stream, whatever max_payload is
_NO_LEADER: Final = (10008, 10009)
NO_MESSAGE: Final = (10037, 10043, 10057)
DOWN: Final = (
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionDrainingError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.NoRespondersError,
    nats.errors.NoServersError,
    nats.errors.OutboundBufferLimitError,
    nats.errors.StaleConnectionError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServerError,
    nats.js.errors.ServiceUnavailableError,
    TimeoutError,
    OSError,
)


class WrongLastSequenceError(Exception):
    """Another client has written to the subject since it was read."""


class SubjectFullError(Exception):
    """The subject has as many messages as its stream allows."""


def is_leaderless(error: BaseException | None) -> bool:
    """Returns whether the stream or consumer has no leader, so that the request had no effect."""
    if isinstance(error, nats.js.errors.APIError):
        return error.err_code in _NO_LEADER
    silent = nats.errors.NoRespondersError, nats.js.errors.NoStreamResponseError
    return isinstance(error, silent)


def is_full(error: BaseException | None) -> bool:
    """Returns whether the stream has as many messages as its limit allows."""
    return (
        isinstance(error, nats.js.errors.APIError)
        and error.err_code == _STORE_FAILED
        and error.description == _STREAM_FULL
    )


@contextmanager
def unavailable() -> Iterator[None]:
    """Raises UnavailableError where NATS is down or silent, and WrongLastSequenceError,
    SubjectFullError or MessageTooLargeError for these refusals."""
    try:
        yield
    except nats.errors.MaxPayloadError as error:
        raise MessageTooLargeError from error
    except nats.js.errors.APIError as error:
        if error.err_code in _WRONG_LAST_SEQUENCE:
            raise WrongLastSequenceError from error
        if error.err_code == _STORE_FAILED and error.description == _SUBJECT_FULL:
            raise SubjectFullError from error
        if error.err_code == _STORE_FAILED and error.description == _MESSAGE_TOO_LARGE:
            raise MessageTooLargeError from error
        if isinstance(error, DOWN):
            raise _unavailable(error) from error
        raise
    except DOWN as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> UnavailableError:
    why = str(error).removeprefix("nats: ") or type(error).__name__
    return UnavailableError(detail=f"IMG2IMG_NATS_URL: NATS cannot be used ({why})")


@dataclass(frozen=True, slots=True)
class ConnectFault:
    """Why a server cannot be used. `final`: another attempt would fail too."""

    sentence: str
    final: bool
    setting: str = "IMG2IMG_NATS_URL"


# The server's errors about connections have no codes.
_REFUSED_USER: Final = (
    "authorization violation",
    "authentication expired",
    "authentication revoked",
)
_NO_INFO: Final = ("expecting info message", "json parse error")


def explain_connect(error: BaseException, server: str, source: str) -> ConnectFault:
    """Explains why a connection to `server` failed.

    Args:
        server: Host and port.
        source: The setting that holds the credentials.
    """
    where, text = f"the NATS server at {server}", str(error).lower()
    match error:
        case ssl.SSLCertVerificationError():
            why = refused_certificate(error, "IMG2IMG_NATS_CA_FILE or SSL_CERT_FILE")
            setting = "IMG2IMG_NATS_CA_FILE" if "not trusted" in why else "IMG2IMG_NATS_URL"
            return ConnectFault(f"{where} {why}", final=True, setting=setting)
        case ssl.SSLError() if "certificate" in text:
            why = f"{where} refused this client's certificate ({error.reason})"
            return ConnectFault(why, final=True, setting="IMG2IMG_NATS_CERT_FILE")
        case ssl.SSLError():
            return ConnectFault(f"{where} ended the TLS handshake ({error.reason})", final=True)
        case nats.errors.SecureConnWantedError():
            why = f"{where} does not offer TLS, which the settings ask for"
            return ConnectFault(why, final=True)
        case nats.errors.AuthorizationError() | nats.errors.InvalidUserCredentialsError():
            return _refused_user(where, source, str(error))
        case nats.errors.Error() if any(part in text for part in _REFUSED_USER):
            return _refused_user(where, source, str(error))
        case nats.errors.Error() if "maximum connections" in text:
            return ConnectFault(f"{where} has its most connections", final=False)
        case nats.errors.Error() if any(part in text for part in _NO_INFO):
            why = f"{server} is no NATS server, or it was closing: it sent no INFO message"
            return ConnectFault(why, final=False)
        case socket.gaierror():
            name = server.rpartition(":")[0] or server
            why = f"the name {name} cannot be resolved ({error.strerror})"
            return ConnectFault(why, final=False)
        case ConnectionRefusedError():
            return ConnectFault(f"nothing listens at {server} (connection refused)", final=False)
        case TimeoutError():
            why = f"{server} did not answer as a NATS server within 2 s"
            return ConnectFault(why, final=False)
        case OSError():
            why = f"{server} cannot be reached ({error.strerror or type(error).__name__})"
            return ConnectFault(why, final=False)
        case _:
            return ConnectFault(f"{where} refused the connection ({error})", final=False)


def _refused_user(where: str, source: str, said: str) -> ConnectFault:
    said = said.removeprefix("nats: ").strip("'\" ")
    return ConnectFault(f"{where} refused the user ({said})", final=True, setting=source)
