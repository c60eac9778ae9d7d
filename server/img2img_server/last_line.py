"""Writes the last line of a process, which has the reason for its end.

Imports the standard library only: it is used before the packages of a role are imported, and where
they are not installed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import NoReturn


def is_json(log_format: str) -> bool:
    """Returns whether the setting log_format means JSON here."""
    return log_format == "json" or (log_format != "console" and not _is_terminal())


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # stderr does not exist or is closed
        return False


def log_format_of_environment() -> str:
    """Returns the setting log_format before the settings are read."""
    return os.environ.get("IMG2IMG_LOG_FORMAT", "auto")


def exit_with_reasons(program: str, reasons: list[str], code: int) -> NoReturn:
    """Writes the reasons on stderr and ends the process without waiting for threads.

    Each reason has its own line, and the last line repeats all of them: often only the last line is
    stored.

    Args:
        program: The beginning of each line, such as "img2img-server worker".
    """
    sentences = [f"{program}: {reason}" for reason in reasons]
    if len(reasons) > 1:
        sentences.append(f"{program}: {len(reasons)} mistakes: {'; '.join(reasons)}")
    with suppress(AttributeError, OSError, ValueError):  # stderr is closed or broken
        sys.stderr.write("".join(f"{_formatted(each, code)}\n" for each in sentences))
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Flushes the output and ends the process without waiting for threads."""
    flush_output()
    os._exit(code)


def flush_output() -> None:
    """Flushes stdout and stderr, either of which may be closed or broken."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()


@contextmanager
def exit_on_signals(program: str) -> Iterator[None]:
    """Makes SIGTERM and SIGINT end the process with a last line that names the signal.

    A role sets handlers of its own when it starts. By default the first process of a container
    ignores SIGTERM.
    """

    def stop(number: int, _: FrameType | None) -> None:
        exit_with_reasons(program, [f"stopped by {signal.Signals(number).name}"], 128 + number)

    signals = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _formatted(sentence: str, code: int) -> str:
    """Returns the sentence, as a log record where the log is JSON."""
    if not is_json(log_format_of_environment()):
        return sentence
    record = {
        "event": sentence,
        "exit_code": code,
        "role": sentence.partition(": ")[0].split()[-1],
        # An operator who sends a signal or asks for a restart (lifecycle.RESTART_CODE) expects the
        # end.
        "level": "info" if code >= 128 or code == 75 else "error",
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
    }
    return json.dumps(record, ensure_ascii=False)
