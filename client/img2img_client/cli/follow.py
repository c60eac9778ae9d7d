"""Follows one job: shows its progress, saves its images, reports how it ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import click

from img2img_client import errors, events
from img2img_client.cli.options import STDIO
from img2img_client.cli.program import (
    FAILED,
    INTERRUPTED,
    EndedError,
    error_facts,
    error_object,
    job_facts,
    to_json,
)
from img2img_client.cli.session import Session
from img2img_client.resources import SUFFIX_FORMATS, Image, Job, State, failure_of
from img2img_client.spec import ImageFormat
from img2img_client.stream import JobStream


@dataclass(slots=True)
class Files:
    """The files of a job's images: out.png, or out-0.png, out-1.png, ... for several samples.

    `output` None: nothing is saved; with `by_id` the name is the job's id, such as 10000001.png.
    `output` -: the image is written to stdout when the job has succeeded. `format`: that of the
    request, which the default name gets as its suffix.
    """

    output: Path | None
    by_id: bool = False
    format: str | None = None
    standard_output: Image | None = None  # the image for stdout
    images: dict[int, Path] = field(default_factory=dict)
    previews: dict[int, Path] = field(default_factory=dict)
    _several: bool = False

    @property
    def is_stdout(self) -> bool:
        """Whether the image goes to stdout."""
        return self.output == Path(STDIO)

    def begin(self, job: Job) -> None:
        """Reads from the job's record how many images it generates, and in which format.

        Raises:
            click.UsageError: the suffix names another format.
        """
        if self.output is None and self.by_id:
            self.output = Path(f"{job.id}.{self.format or 'png'}")
        self._several = job.spec.samples > 1
        if self.is_stdout:
            if self._several:
                text = f"{job.name} has several images: --output - takes jobs with one image only"
                raise click.UsageError(text)
            return
        format_ = job.spec.output_format
        format_ = ImageFormat.JPEG if format_ is ImageFormat.UNSPECIFIED else format_
        if self.output is not None and SUFFIX_FORMATS.get(self.output.suffix.lower()) != format_:
            text = f"the images of {job.name} are {format_}: --output must end in .{format_}"
            raise click.UsageError(text)

    def save(self, event: events.Event) -> None:
        """Saves the event's image, if it has one."""
        if self.output is None:
            return
        if self.is_stdout:
            # Another attempt of the job sends the image again, so it is written at the end.
            if isinstance(event, events.SampleFinished):
                self.standard_output = event.image
            return
        if isinstance(event, events.SampleFinished):
            path = self._path(self.output, event.sample, self.output.suffix)
            self.images[event.sample] = event.image.save(path)
        elif isinstance(event, events.Preview):
            path = self._path(self.output, event.sample, "-preview.jpg")
            self.previews[event.sample] = event.image.save(path)

    def _path(self, output: Path, sample: int, ending: str) -> Path:
        number = f"-{sample}" if self._several else ""
        return output.with_name(f"{output.stem}{number}{ending}")


def check_stdout(*refused: str) -> None:
    """Checks that an image can be written to stdout, and nothing else will be.

    Args:
        refused: the given options that print text or more than one image.

    Raises:
        click.BadParameter: it cannot.
    """
    hint = "--output"
    if refused:
        text = f"- cannot be combined with {', '.join(refused)}: stdout gets one image only"
        raise click.BadParameter(text, param_hint=hint)
    if sys.stdout.buffer.isatty():
        text = "- writes the image to stdout, which is a terminal: use > FILE or a pipe"
        raise click.BadParameter(text, param_hint=hint)


def check_output(output: Path | None, given: str | None = None) -> str:
    """Returns the image format of the request, and creates the folder before any work is done.

    Args:
        output: the file of the image. Its suffix is the format if `given` is None.
        given: the value of --format.

    Raises:
        click.BadParameter: the suffix is not known or is another format, or the file cannot be
            written.
    """
    if output is None or output == Path(STDIO):
        return given or "png"
    wanted = SUFFIX_FORMATS.get(output.suffix.lower())
    if wanted is None:
        text = f"{output} must end in one of {', '.join(SUFFIX_FORMATS)}"
        raise click.BadParameter(text, param_hint="--output")
    if given not in (None, wanted):
        raise click.BadParameter(f"{output} is not a {given} file", param_hint="--format")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"cannot create the folder {output.parent}: {error.strerror}"
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
        ours: Leaving the stream early cancels the job.
        timeout_seconds: The timeout of the stream, for the error message.
    """
    from img2img_client.cli.report import show_ended  # rich is slow to import

    try:
        with _signals_interrupt():
            job = _read(stream, files)
    except KeyboardInterrupt:
        _interrupted(session, stream, ours)
    except errors.RpcError as error:
        raise _explained(session, stream, error, ours, timeout_seconds) from error
    failure = failure_of(job)
    if session.as_json:
        facts = job_facts(job, files.images, files.previews)
        click.echo(to_json(facts | ({"error": error_facts(failure)} if failure else {})))
    else:
        image = files.standard_output
        if image is not None and image.data and job.state is State.SUCCEEDED:
            stdout = sys.stdout.buffer
            stdout.write(image.data)
            stdout.flush()
        show_ended(job, files.images, files.previews, err=files.is_stdout)
        if files.is_stdout and image is None and job.state is State.SUCCEEDED:
            text = f"{job.name} has no image bytes any more: download its link"
            raise click.ClickException(text)
    if job.state is not State.SUCCEEDED:
        raise click.exceptions.Exit(FAILED)


def cancel_text(job: Job) -> str:
    """Returns the state of a job that was asked to cancel, as a sentence."""
    if job.state is State.CANCELLED:
        return f"{job.name} was cancelled"
    if job.state.is_terminal:
        return f"{job.name} has already {job.state}"
    return f"{job.name} is being cancelled and stops at its next step"


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP act like Ctrl-C, unless they are ignored (nohup)."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [each for each in known if signal.getsignal(each) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        taken = []  # Python accepts signal handlers in the main thread only.
    for each in taken:
        signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


def _read(stream: JobStream, files: Files) -> Job:
    from img2img_client.cli.progress import display

    with stream, display() as show:
        for event in stream:
            if isinstance(event, events.Snapshot):
                files.begin(event.job)
            files.save(event)
            show(event)
        assert stream.job is not None  # the terminal event contains the job
        return stream.job


def _interrupted(session: Session, stream: JobStream, ours: bool) -> NoReturn:
    """Reports what Ctrl-C did. Leaving a stream that created its job cancels the job."""
    name, state, text = stream.job_name, "", "stopped by Ctrl-C"
    if name:
        text, state = _after_leaving(session, name) if ours else (f"{name} keeps running", "")
        click.echo(text, err=True)
    facts = {"name": name, "state": state, **error_object("INTERRUPTED", text)}
    raise EndedError(INTERRUPTED, facts)


def _explained(
    session: Session,
    stream: JobStream,
    error: errors.RpcError,
    ours: bool,
    timeout_seconds: float | None,
) -> errors.RpcError:
    """Returns the error of a broken stream, with the state of its job if there is one."""
    name, is_timeout = stream.job_name, isinstance(error, errors.DeadlineExceededError)
    fate = "the service had not responded"
    if stream.job is not None and not isinstance(error, errors.NotFoundError):
        error.metadata.setdefault("job", name)
        is_away = isinstance(error, errors.UnavailableError)
        fate, state = ("", "") if is_away or not ours else _after_leaving(session, name)
        if not state:
            again = f"img2img watch {name.removeprefix('jobs/')} --after {stream.sequence}"
            fate = f"{name} may still be running; follow it with: {again}"
        if not is_timeout:
            click.echo(fate, err=True)
    if is_timeout and timeout_seconds is not None:
        error.args = (f"timed out after {timeout_seconds:g} s; {fate}",)
    return error


def _after_leaving(session: Session, name: str) -> tuple[str, str]:
    """Returns a sentence about a job whose stream was closed, and the job's state; "" if it is
    unknown.
    """
    try:
        job = session.client.get(name)
    except errors.Img2ImgError as error:
        return f"{name} may still be running: {error}", ""
    return cancel_text(job), job.state
