"""`img2img generate`, `estimate`, `watch`, `get`, `list`, `cancel`, `redeliver`, `capabilities`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click

from img2img_client.cli.follow import Files, cancel_text, check_output, check_stdout, follow
from img2img_client.cli.options import init_image_option, job_options, read_init_image
from img2img_client.cli.program import job_facts
from img2img_client.cli.session import Seconds, Session, command, read_job
from img2img_client.resources import Job, State

STATES = [state.value for state in State if state is not State.UNSPECIFIED]


@click.command()
@click.option("--prompt", required=True, help="Description of the image.")
@init_image_option(required=True)
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="File of the image, such as out.png, out.jpg or out.webp, or - for stdout. Several "
    "samples are saved as out-0.png, out-1.png and so on. Default: the id of the job, such as "
    "10000001.png.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["png", "jpeg", "webp"]),
    help="Format of the images. Default: that of the suffix of --output, else png.",
)
@job_options
@click.option(
    "--request-id", metavar="UUID", help="A request with the same id returns the same job."
)
@click.option("--detach", is_flag=True, help="Queue the job, print its name and return.")
@click.option(
    "--timeout",
    "timeout_seconds",
    metavar="SECONDS",
    type=Seconds(),
    help="Cancel the job if it has not ended after this time.",
)
@command
def generate(
    session: Session,
    *,
    prompt: str,
    init_image: str,
    output: Path | None,
    output_format: str | None,
    detach: bool,
    request_id: str | None,
    timeout_seconds: float | None,
    **options: Any,
) -> None:
    """Generate images from an init image and a prompt, and save them. Ctrl-C cancels the job."""
    files = Files(output, by_id=True, format=output_format)
    options |= {"output_format": check_output(output, output_format), "request_id": request_id}
    if files.is_stdout:
        refused = {"--json": session.as_json, "--detach": detach}
        refused |= {"--samples": (options["samples"] or 1) > 1}
        refused |= {"--preview-every": options["preview_interval_steps"] is not None}
        check_stdout(*(name for name, is_given in refused.items() if is_given))
    source = read_init_image(init_image)
    if detach:
        if timeout_seconds is not None:
            raise click.UsageError("--timeout cannot be combined with --detach")
        job = session.client.create(prompt, source, **options)
        session.answer(job, lambda: _queued(job, output))
        return
    stream = session.client.stream(prompt, source, timeout_seconds=timeout_seconds, **options)
    follow(session, stream, files, ours=True, timeout_seconds=timeout_seconds)


@click.command()
@click.option("--prompt", required=True, help="Description of the image.")
@init_image_option(required=False)
@job_options
@command
def estimate(session: Session, *, prompt: str, init_image: str | None, **options: Any) -> None:
    """Estimate the time and the price of a job without creating it.

    The init image is not decoded: sides that you leave out are those of a square init image, and a
    warning says so. Give --width and --height for an estimate of another shape.
    """
    from img2img_client.cli.report import show_estimate

    source = None if init_image is None else read_init_image(init_image)
    found = session.client.estimate(prompt, source, **options)
    session.answer(found, lambda: show_estimate(found))


def _queued(job: Job, output: Path | None) -> None:
    target = output or f"{job.id}.png"
    click.echo(f"{job.name} is queued; follow it with: img2img watch {job.id} --output {target}")
    if job.warning:
        click.echo(f"Warning: {job.warning}")


@click.command()
@click.argument("job", callback=read_job)
@click.option(
    "--after",
    "after",
    metavar="NUMBER",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="Skip the events up to this sequence number.",
)
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Save the images to this file. Its suffix must match the format of the job's images; - is "
    "stdout. Default: save nothing.",
)
@command
def watch(session: Session, *, job: str, after: int, output: Path | None) -> None:
    """Follow a job to its end. Ctrl-C leaves the job running."""
    files = Files(output)
    check_output(output)
    if files.is_stdout:
        check_stdout(*(["--json"] if session.as_json else []))
    stream = session.client.watch(job, after_sequence=after)
    follow(session, stream, files, ours=False)


@click.command()
@click.argument("job", callback=read_job)
@command
def get(session: Session, *, job: str) -> None:
    """Show the current record of a job."""
    from img2img_client.cli.report import show_job

    found = session.client.get(job)
    session.answer(found, lambda: show_job(found))


@click.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="List only jobs in this state. May be repeated.",
)
@click.option(
    "--limit",
    metavar="NUMBER",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Maximum number of jobs.",
)
@click.option("--request-id", metavar="UUID", help="List only the job of this request.")
@command
def list_jobs(
    session: Session, *, states: tuple[str, ...], limit: int, request_id: str | None
) -> None:
    """List your jobs, newest first."""
    from img2img_client.cli.report import show_jobs

    pages = session.client.list(*states, page_size=min(limit, 100), request_id=request_id or "")
    found = list(itertools.islice(pages, limit))
    session.answer({"jobs": [job_facts(job) for job in found]}, lambda: show_jobs(found))


@click.command()
@click.argument("job", callback=read_job)
@command
def cancel(session: Session, *, job: str) -> None:
    """Cancel a job: a queued job at once, a running job at its next step."""
    found = session.client.cancel(job)
    session.answer(found, lambda: click.echo(cancel_text(found)))


@click.command()
@click.argument("job", callback=read_job)
@command
def redeliver(session: Session, *, job: str) -> None:
    """Send the webhook of an ended job again."""
    found = session.client.redeliver_webhook(job)
    session.answer(found, lambda: click.echo(f"{found.name}: the webhook will be sent again"))


@click.command()
@command
def capabilities(session: Session) -> None:
    """Show the models and the limits of the service."""
    from img2img_client.cli.report import show_capabilities

    found = session.client.capabilities()
    session.answer(found, lambda: show_capabilities(found))
