"""Reports why a process ends: in the log, and as its last line on stderr.

A role ends with an exception. Code that raises one while the remaining shutdown may take time
(closing connections, requeueing jobs) is wrapped in `logs_reason`, so that the reason is in the log
in any case. `leave` writes the last line, after everything else.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

import structlog

from img2img_server.errors import JobFailedError, OperatorError, ServiceError
from img2img_server.extras import install_command
from img2img_server.last_line import exit_with_reasons, log_format_of_environment
from img2img_server.lifecycle import RESTART_CODE, RestartError
from img2img_server.settings import Settings, SettingsError
from img2img_server.telemetry import configure_logging

SETTINGS_CODE: Final = 2
ERROR_CODE: Final = 1
_EXPECTED: Final = (
    *(OperatorError, ServiceError, JobFailedError),
    *(KeyboardInterrupt, RestartError),
)

log = structlog.get_logger()


@contextmanager
def logs_reason() -> Iterator[None]:
    """Logs an error of the body before any other step of the shutdown."""
    try:
        yield
    except RestartError:
        raise
    except Exception as error:
        log_reason(error)
        raise


def log_reason(error: BaseException) -> None:
    """Logs an error that ends the process, only once. An unexpected error is logged with its
    traceback.
    """
    if getattr(error, "_is_logged", False):
        return
    with suppress(AttributeError):
        error._is_logged = True  # type: ignore[attr-defined]
    traceback = {} if is_expected(error) else {"exc_info": error}
    for reason in reasons_of(error):
        log.error("role_failed", reason=reason, **traceback)
        traceback = {}


def reasons_of(error: BaseException) -> list[str]:
    """Returns the reasons why the process ends, one sentence for each mistake."""
    if isinstance(error, BaseExceptionGroup):
        nested = (reasons_of(each) for each in error.exceptions)
        return list(dict.fromkeys(reason for reasons in nested for reason in reasons))
    if isinstance(error, SettingsError):
        return [_line(mistake) for mistake in error.mistakes] or ["wrong settings"]
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted before it served"]
    text = _line(getattr(error, "detail", "") or str(error))
    if isinstance(error, _EXPECTED) and text:
        return [text]
    if isinstance(error, ModuleNotFoundError) and error.name:
        return [
            f"the Python package {error.name.partition('.')[0]} is missing: "
            f"{install_command('worker')}"
        ]
    return [f"unexpected {type(error).__name__}: {text or 'without a message'}"]


def is_expected(error: BaseException) -> bool:
    """Returns whether the error's message suffices without a traceback."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_expected, error.exceptions))
    return isinstance(error, _EXPECTED)


def code_of(error: BaseException) -> int:
    """Returns the exit code: 2 for wrong settings, 75 for a restart, 130 after Ctrl-C, else 1."""
    if isinstance(error, BaseExceptionGroup):
        codes = {code_of(each) for each in error.exceptions}
        return codes.pop() if len(codes) == 1 else ERROR_CODE
    if isinstance(error, SettingsError):
        return SETTINGS_CODE
    if isinstance(error, RestartError):
        return RESTART_CODE
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else ERROR_CODE


def leave(program: str, error: BaseException) -> NoReturn:
    """Ends the process with the reasons of an error as its last line.

    Args:
        program: The beginning of the line, such as "img2img-server worker".
    """
    if not is_expected(error):
        if not structlog.is_configured():
            log_format = log_format_of_environment()
            configure_logging(Settings.model_construct(log_format=log_format), program)
        log_reason(error)
    exit_with_reasons(program, reasons_of(error), code_of(error))


def _line(text: str) -> str:
    return " ".join(text.split())
