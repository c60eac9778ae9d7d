"""Ends a command with one exit code and, with --json, one object on stdout."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click

from img2img_client.errors import (
    Img2ImgError,
    InvalidRequestError,
    JobEndError,
    JobFailedError,
    RpcError,
    invalid,
)
from img2img_client.resources import Job

FAILED, WRONG, INTERRUPTED = 1, 2, 130


class EndedError(Exception):
    """Ends a command that has already printed why on stderr. `facts`: the object of --json."""

    def __init__(self, code: int, facts: dict[str, object]) -> None:
        super().__init__()
        self.code, self.facts = code, facts


class Program(click.Group):
    """The group of all commands. It turns every error into an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs the command that `args` name and exits."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        as_json = "--json" in options  # The parser may fail before it reads --json.
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except EndedError as ended:
            _end(as_json, ended.code, ended.facts)
        except click.Abort:
            _end(as_json, INTERRUPTED, error_object("INTERRUPTED", "stopped by Ctrl-C"))
        except click.ClickException as error:
            error.show()
            _end(as_json, error.exit_code, {"error": _usage_facts(error)})
        except Img2ImgError as error:
            _show(error)
            code = WRONG if isinstance(error, InvalidRequestError) else FAILED
            _end(as_json, code, {"error": error_facts(error)})
        except OSError as error:
            if error.errno == errno.EPIPE:  # The reader of stdout has closed the pipe.
                raise
            text = f"cannot write {error.filename or 'the output'}: {error.strerror or error}"
            click.echo(f"Error: {text}", err=True)
            _end(as_json, FAILED, error_object("FILE_NOT_WRITTEN", text))
        except Exception as error:  # The command has a bug, whose place the traceback shows.
            if as_json:
                click.echo(to_json(error_object("INTERNAL", repr(error))))
            raise
        sys.exit(code if isinstance(code, int) else 0)


def _show(error: Img2ImgError) -> None:
    """Prints one line for each violation, then the hints."""
    violations = error.violations if isinstance(error, RpcError) else ()
    for line in [violation.description for violation in violations] or [str(error)]:
        click.echo(f"Error: {line}", err=True)
    for note in getattr(error, "__notes__", ()):
        click.echo(note, err=True)


def _end(as_json: bool, code: int, facts: dict[str, object]) -> NoReturn:
    if as_json:
        try:
            click.echo(to_json(facts))
        except OSError as error:  # stdout is full or closed. The message on stderr has the reason.
            click.echo(f"Error: cannot write to stdout: {error.strerror}", err=True)
            code = code or FAILED
    sys.exit(code)


def job_facts(
    job: Job, paths: Mapping[int, Path] | None = None, previews: Mapping[int, Path] | None = None
) -> dict[str, object]:
    """Returns a job as every command prints it with --json.

    Args:
        paths: the file of each sample.
        previews: the file of each sample's last preview.
    """
    paths, previews = paths or {}, previews or {}
    samples = [
        {**asdict(sample), "path": paths.get(sample.index), "preview": previews.get(sample.index)}
        for sample in job.samples
    ]
    return {**asdict(job), "samples": samples}


def error_object(reason: str, message: str) -> dict[str, object]:
    """Returns what --json prints for an error of the command itself."""
    return {"error": {"reason": reason, "message": message}}


def error_facts(error: Img2ImgError) -> dict[str, object]:
    """Returns an error as --json prints it."""
    facts: dict[str, object] = {"reason": error.reason, "message": str(error)}
    if isinstance(error, RpcError):
        facts |= {"code": error.code, "metadata": error.metadata}
        facts["retry_seconds"] = error.retry_seconds
        facts["violations"] = [asdict(violation) for violation in error.violations]
    if isinstance(error, JobEndError):
        facts["retryable"] = isinstance(error, JobFailedError) and error.retryable
    return facts


def _usage_facts(error: click.ClickException) -> dict[str, object]:
    """Returns the facts of a wrong command line, in the form of a rejected request."""
    name: object = getattr(error, "option_name", "")  # option that does not exist
    if isinstance(error, click.BadParameter):
        name = error.param.name if error.param else error.param_hint
    # A hint may continue with the place of a setting, such as "server in config.toml".
    field = name.split(" ")[0].lstrip("-").replace("-", "_") if isinstance(name, str) else ""
    return error_facts(invalid(field, "INVALID_FORMAT", error.format_message()))


def count(number: int, noun: str) -> str:
    """Returns a number with its noun, for example "1 job" or "2 jobs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def to_json(value: object) -> str:
    """Returns indented JSON; dataclasses become objects, times RFC 3339 in UTC."""
    return json.dumps(value, indent=2, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
