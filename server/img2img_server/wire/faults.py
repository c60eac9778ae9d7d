"""What NATS can answer, in words of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import nats.errors
import nats.js.errors

from img2img_server.errors import UnavailableError

# Error codes of the server, and the one text that tells two meanings of a code apart.
_WRONG_LAST_SEQUENCE: Final = (10071, 10164)
_STORE_FAILED: Final = 10077
_SUBJECT_FULL: Final = "maximum messages per subject exceeded"
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
    """The subject was written by somebody else since it was read."""


class SubjectFullError(Exception):
    """The subject has as many messages as its stream allows."""


def is_leaderless(error: BaseException | None) -> bool:
    """Whether the server said that nobody leads the stream or consumer: nothing was done."""
    if isinstance(error, nats.js.errors.APIError):
        return error.err_code in _NO_LEADER
    silent = nats.errors.NoRespondersError, nats.js.errors.NoStreamResponseError
    return isinstance(error, silent)


@contextmanager
def unavailable() -> Iterator[None]:
    """Turns what is raised when the bus is down or silent into UnavailableError, and the two
    refusals that callers can expect into their own errors."""
    try:
        yield
    except nats.js.errors.APIError as error:
        if error.err_code in _WRONG_LAST_SEQUENCE:
            raise WrongLastSequenceError from error
        if error.err_code == _STORE_FAILED and error.description == _SUBJECT_FULL:
            raise SubjectFullError from error
        if isinstance(error, DOWN):
            raise UnavailableError from error
        raise
    except DOWN as error:
        raise UnavailableError from error
