"""Follows one job from the terminal: shows it, saves its pictures, tells how it ended."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import click

from img2img_client import events
from img2img_client.cli.session import FAILED, INTERRUPTED, Session, error_facts, to_json
from img2img_client.errors import (
    Img2ImgError,
    JobCancelledError,
    JobEndError,
    JobFailedError,
    RpcError,
)
from img2img_client.resources import SUFFIX_FORMATS, ImageFormat, Job, State
from img2img_client.stream import JobStream


@dataclass(slots=True)
class Files:
    """Where the pictures of a job go: out.png, or out-0.png, out-1.png, ... of several.

    `output` None: nothing is saved, or with `by_id` to 10000001.png.
    """

    output: Path | None
    by_id: bool = False
    pictures: dict[int, Path] = field(default_factory=dict)
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
            self.pictures[event.sample] = event.image.save(path)
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


def follow(session: Session, stream: JobStream, files: Files, *, ours: bool) -> None:
    """Follows the job to its end and exits with its code. `ours`: Ctrl-C cancels it."""
    from img2img_client.cli.report import show_ended  # rich takes a while to import

    try:
        job = _read(stream, files)
    except KeyboardInterrupt:
        _interrupted(session, stream, ours)
    except RpcError:
        if stream.job_name:
            number = stream.job_name.removeprefix("jobs/")
            again = f"img2img watch {number} --after {stream.sequence}"
            click.echo(f"{stream.job_name} may still be running; follow it: {again}", err=True)
        raise
    if session.as_json:
        click.echo(to_json(facts(job, files)))
    else:
        show_ended(job, files.pictures, files.previews)
    if job.state is not State.SUCCEEDED:
        raise click.exceptions.Exit(FAILED)


def facts(job: Job, files: Files) -> dict[str, object]:
    """An ended job and its files as JSON has them."""
    pictures = []
    for sample in job.samples:
        path = files.pictures.get(sample.index)
        pictures.append({**asdict(sample), "path": path and str(path)})
    known: dict[str, object] = {
        "job": job.name,
        "state": job.state,
        "pictures": pictures,
        "previews": [str(path) for path in files.previews.values()],
        "timings": job.timings and asdict(job.timings),
        "model": job.spec.model,
        "worker": job.worker,
        "device": job.device,
        "determinism": job.determinism,
        "attempt": job.attempt,
        "warning": job.warning,
    }
    error = ending_error(job)
    return known | ({"error": error_facts(error)} if error else {})


def ending_error(job: Job) -> JobEndError | None:
    """The error of a job that ended without pictures."""
    if job.state is State.FAILED:
        return JobFailedError(job)
    return JobCancelledError(job) if job.state is State.CANCELLED else None


def cancel_text(job: Job) -> str:
    """How a job stands after it was asked to end."""
    later = "" if job.state.is_terminal else ", it stops at its next step"
    return f"{job.name} is {job.state}{later}"


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
    """Tells what Ctrl-C did; leaving the stream has already cancelled a job of ours."""
    name, state = stream.job_name, ""
    if ours and name:
        try:
            job = session.client.get(name)
        except Img2ImgError as error:
            click.echo(f"{name} may still be running: {error}", err=True)
        else:
            state = job.state
            click.echo(cancel_text(job), err=True)
    elif name:
        click.echo(f"{name} goes on", err=True)
    if session.as_json:
        click.echo(to_json({"job": name, "state": state}))
    raise click.exceptions.Exit(INTERRUPTED)
