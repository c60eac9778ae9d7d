"""The output of --json: jobs and errors, each in one shape for all commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path

import click

from img2img_client.errors import (
    Img2ImgError,
    InvalidRequestError,
    JobCancelledError,
    JobEndError,
    JobFailedError,
    RpcError,
    Violation,
)
from img2img_client.resources import Job, State

FAILED, WRONG, INTERRUPTED = 1, 2, 130


class EndedError(Exception):
    """A command has said on stderr how it ended.

    Args:
        code: the exit code.
        error: what --json prints as "error".
        facts: what --json prints beside it.
    """

    def __init__(
        self, code: int, error: dict[str, object], facts: dict[str, object] | None = None
    ) -> None:
        super().__init__()
        self.code = code
        self.facts = {**(facts or {}), "error": error}


def job_facts(
    job: Job, paths: Mapping[int, Path] | None = None, previews: Mapping[int, Path] | None = None
) -> dict[str, object]:
    """A job as every command prints it: its record, and where its images were saved.

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


def ending_error(job: Job) -> JobEndError | None:
    """The error of a job that ended without pictures."""
    if job.state is State.FAILED:
        return JobFailedError(job)
    return JobCancelledError(job) if job.state is State.CANCELLED else None


def error_facts(error: Img2ImgError) -> dict[str, object]:
    """An error as JSON has it."""
    facts = simple_facts(error.reason, str(error))
    if isinstance(error, RpcError):
        facts |= {"code": error.code, "metadata": error.metadata}
        facts["retry_seconds"] = error.retry_seconds
        facts["violations"] = [asdict(violation) for violation in error.violations]
    if isinstance(error, JobEndError):
        facts["retryable"] = isinstance(error, JobFailedError) and error.retryable
    return facts


def usage_facts(error: click.ClickException) -> dict[str, object]:
    """A wrong command line as JSON has it, in the shape of a refused request."""
    message = error.format_message()
    named: object = getattr(error, "option_name", "")  # of an option that does not exist
    if isinstance(error, click.BadParameter):
        named = error.param.name if error.param else error.param_hint
    field = named.lstrip("-").replace("-", "_") if isinstance(named, str) else ""
    invalid = InvalidRequestError(
        message,
        code="INVALID_ARGUMENT",
        reason="INVALID_REQUEST",
        violations=(Violation(field, message),),
    )
    return error_facts(invalid)


def simple_facts(reason: str, message: str) -> dict[str, object]:
    """The fields of every error."""
    return {"reason": reason, "message": message}


def count(number: int, noun: str) -> str:
    """For example "1 job" or "2 jobs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def to_json(value: object) -> str:
    """The value as indented JSON; dataclasses become objects, times become RFC 3339 in UTC."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, indent=2, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
