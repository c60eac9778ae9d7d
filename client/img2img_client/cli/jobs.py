"""`img2img watch`, `get`, `list`, `cancel`, `redeliver` and `capabilities`."""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from img2img_client.cli.follow import Files, cancel_text, check_output, follow
from img2img_client.cli.output import job_facts
from img2img_client.cli.session import Session, command, read_job
from img2img_client.resources import State

STATES = [state.value for state in State if state is not State.UNSPECIFIED]


@click.command()
@click.argument("job", callback=read_job)
@click.option(
    "--after",
    "after",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="Leave out events up to this number.",
)
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Save the pictures there, in the format that the job was asked for.",
)
@command
def watch(session: Session, *, job: str, after: int, output: Path | None) -> None:
    """Follow a job to its end. Ctrl-C leaves it running."""
    check_output(output)
    stream = session.client.watch(job, after_sequence=after)
    follow(session, stream, Files(output), ours=False)


@click.command()
@click.argument("job", callback=read_job)
@command
def get(session: Session, *, job: str) -> None:
    """Show a job as it is now."""
    from img2img_client.cli.report import show_job

    found = session.client.get(job)
    session.answer(found, lambda: show_job(found))


@click.command("list")
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="Only these.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Most jobs to list."
)
@command
def list_jobs(session: Session, *, states: tuple[str, ...], limit: int) -> None:
    """List your jobs, newest first."""
    from img2img_client.cli.report import show_jobs

    pages = session.client.list(*states, page_size=min(limit, 100))
    found = list(itertools.islice(pages, limit))
    session.answer({"jobs": [job_facts(job) for job in found]}, lambda: show_jobs(found))


@click.command()
@click.argument("job", callback=read_job)
@command
def cancel(session: Session, *, job: str) -> None:
    """Cancel a job: at once when it waits, at its next step when it runs."""
    found = session.client.cancel(job)
    session.answer(found, lambda: click.echo(cancel_text(found)))


@click.command()
@click.argument("job", callback=read_job)
@command
def redeliver(session: Session, *, job: str) -> None:
    """Send the webhook of a job that has ended once more."""
    found = session.client.redeliver_webhook(job)
    session.answer(found, lambda: click.echo(f"{found.name}: its webhook is sent again"))


@click.command()
@command
def capabilities(session: Session) -> None:
    """Show the models and limits of the service."""
    from img2img_client.cli.report import show_capabilities

    found = session.client.capabilities()
    session.answer(found, lambda: show_capabilities(found))
