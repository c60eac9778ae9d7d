"""Follows one job from the terminal: shows it, saves its pictures, tells how it ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import click

from img2img_client import errors, events
from img2img_client.cli.output import (
    FAILED,
    INTERRUPTED,
    EndedError,
    ending_error,
    error_facts,
    job_facts,
    simple_facts,
    to_json,
)
from img2img_client.cli.session import Session
from img2img_client.resources import SUFFIX_FORMATS, ImageFormat, Job, State
from img2img_client.stream import JobStream


@dataclass(slots=True)
class Files:
    """Where the pictures of a job go: out.png, or out-0.png, out-1.png, ... of several.

    `output` None: nothing is saved, or with `by_id` to 10000001.png.
    """

    output: Path | None
    by_id: bool = False
    images: dict[int, Path] = field(default_factory=dict)
    previews: dict[int, Path] = field(default_factory=dict)
    _several: bool = False

    def begin(self, job: Job) -> None:
        """Learns from the job's record how many pictures of which format will come.

        Raises:
            click.UsageError: the suffix names another format.
        """
        if self.output is None and self.by_id:
            self.output = Path(f"{job.id}.png")
        self._several = job.spec.samples > 1
        made = job.spec.output_format
        made = ImageFormat.JPEG if made is ImageFormat.UNSPECIFIED else made
        if self.output is not None and SUFFIX_FORMATS.get(self.output.suffix.lower()) != made:
            raise click.UsageError(
                f"{job.name} makes {made} pictures: give --output a .{made} file"
            )

    def save(self, event: events.Event) -> None:
        """Saves the event's picture, if it has one."""
        if self.output is None:
            return
        if isinstance(event, events.SampleFinished):
            path = self._path(event.sample, self.output.suffix)
            self.images[event.sample] = event.image.save(path)
        elif isinstance(event, events.Preview):
            path = self._path(event.sample, "-preview.jpg")
            self.previews[event.sample] = event.image.save(path)

    def _path(self, sample: int, ending: str) -> Path:
        assert self.output is not None
        number = f"-{sample}" if self._several else ""
        return self.output.with_name(f"{self.output.stem}{number}{ending}")


def check_output(output: Path | None) -> str:
    """The picture format that the suffix asks for; makes the folder, so that no work is lost.

    Raises:
        click.BadParameter: the suffix is not known or the place cannot be written.
    """
    if output is None:
        return "png"
    wanted = SUFFIX_FORMATS.get(output.suffix.lower())
    if wanted is None:
        known = ", ".join(SUFFIX_FORMATS)
        raise click.BadParameter(f"{output} must end in one of {known}", param_hint="--output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"cannot make the folder {output.parent}: {error.strerror}"
        raise click.BadParameter(text, param_hint="--output") from error
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise click.BadParameter(f"{output} cannot be written", param_hint="--output")
    return wanted


def follow(
    session: Session,
    stream: JobStream,
    files: Files,
    *,
    ours: bool,
    timeout_seconds: float | None = None,
) -> None:
    """Follows a job to its end and exits with its code.

    Args:
        ours: leaving the stream early cancels the job.
        timeout_seconds: that of the stream, for the sentence.
    """
    from img2img_client.cli.report import show_ended  # rich takes a while to import

    try:
        with _signals_interrupt():
            job = _read(stream, files)
    except KeyboardInterrupt:
        _interrupted(session, stream, ours)
    except errors.RpcError as error:
        raise _left(session, stream, error, ours, timeout_seconds) from error
    failure = ending_error(job)
    if session.as_json:
        facts = job_facts(job, files.images, files.previews)
        click.echo(to_json(facts | ({"error": error_facts(failure)} if failure else {})))
    else:
        show_ended(job, files.images, files.previews)
    if job.state is not State.SUCCEEDED:
        raise click.exceptions.Exit(FAILED)


def cancel_text(job: Job) -> str:
    """How a job stands after it was asked to end."""
    if job.state is State.CANCELLED:
        return f"{job.name} was cancelled"
    if job.state.is_terminal:
        return f"{job.name} is {job.state}"
    return f"{job.name} is being cancelled, it stops at its next step"


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Has SIGTERM and SIGHUP leave the stream as Ctrl-C does, unless they are ignored (nohup)."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [each for each in known if signal.getsignal(each) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        taken = []  # Python allows handlers there only
    for each in taken:
        signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


def _read(stream: JobStream, files: Files) -> Job:
    from img2img_client.cli.progress import display

    with stream, display() as shown:
        for event in stream:
            if isinstance(event, events.Snapshot):
                files.begin(event.job)
            files.save(event)
            shown.show(event)
        assert stream.job is not None  # a finished stream has seen its job
        return stream.job


def _interrupted(session: Session, stream: JobStream, ours: bool) -> NoReturn:
    """Says what Ctrl-C did; leaving the stream has already cancelled a job of ours."""
    name, state, text = stream.job_name, "", "stopped by Ctrl-C"
    if name:
        text, state = _after_leaving(session, name) if ours else (f"{name} goes on", "")
        click.echo(text, err=True)
    facts: dict[str, object] = {"name": name, "state": state}
    raise EndedError(INTERRUPTED, simple_facts("INTERRUPTED", text), facts)


def _left(
    session: Session,
    stream: JobStream,
    error: errors.RpcError,
    ours: bool,
    timeout_seconds: float | None,
) -> errors.RpcError:
    """The error of a stream that broke, with what became of its job if it was seen at all."""
    name, is_timeout = stream.job_name, isinstance(error, errors.DeadlineExceededError)
    became = "before the service answered"
    if stream.job is not None and not isinstance(error, errors.NotFoundError):
        error.metadata.setdefault("job", name)
        is_away = isinstance(error, errors.UnavailableError)
        became, state = ("", "") if is_away or not ours else _after_leaving(session, name)
        if not state:
            again = f"img2img watch {name.removeprefix('jobs/')} --after {stream.sequence}"
            became = f"{name} may still be running; follow it: {again}"
        if not is_timeout:
            click.echo(became, err=True)
    if is_timeout and timeout_seconds is not None:
        return errors.DeadlineExceededError(
            f"timed out after {timeout_seconds:g} s; {became}",
            code=error.code,
            reason=error.reason,
            metadata=error.metadata,
        )
    return error


def _after_leaving(session: Session, name: str) -> tuple[str, str]:
    """Returns a phrase about a job that was left, and the job's state; "" when it is not known."""
    try:
        job = session.client.get(name)
    except errors.Img2ImgError as error:
        return f"{name} may still be running: {error}", ""
    return cancel_text(job), job.state
