"""`img2img admin ...`: manages the service, with a key that may."""

from __future__ import annotations

import click

from img2img_client.admin import StorageSettings
from img2img_client.cli.output import count
from img2img_client.cli.session import Session, command


@click.group()
def admin() -> None:
    """Manage the service. Needs a key with the permission `operate` or `storage`."""


@admin.command()
@command
def details(session: Session) -> None:
    """Show how the service is doing."""
    found = session.client.admin.system_details()

    def show() -> None:
        click.echo(f"version {found.server_version}, up {found.uptime_seconds:.0f} s")
        busy = f", GPUs {found.gpu_usage:.0%} busy" if _has_gpus(session) else ""
        click.echo(f"{count(found.model_count, 'model')}{busy}")
        wait = "waits" if found.queued_jobs == 1 else "wait"
        seconds = found.queue_duration_seconds
        click.echo(f"{count(found.queued_jobs, 'job')} {wait}, about {seconds:.1f} s")

    session.answer(found, show)


@admin.command()
@command
def restart(session: Session) -> None:
    """Restart every worker. Running jobs start anew."""
    session.client.admin.restart_server()
    _done(session, "workers restart")


@admin.command()
@command
def update(session: Session) -> None:
    """Have workers read settings and model files again, which restarts them."""
    session.client.admin.update_server()
    _done(session, "workers restart and read everything again")


@admin.command("clear-cache")
@command
def clear_cache(session: Session) -> None:
    """Empty the workers' caches."""
    session.client.admin.clear_cache()
    _done(session, "caches are emptied")


@admin.command("clear-queue")
@command
def clear_queue(session: Session) -> None:
    """End your waiting jobs as failed."""
    cleared = session.client.admin.clear_queue()
    session.answer({"cleared_jobs": cleared}, lambda: click.echo(f"{count(cleared, 'job')} ended"))


@admin.command("set-storage")
@click.option("--public-url", required=True, help="Base of the links.")
@click.option("--endpoint-url", required=True, help="Where files are sent.")
@click.option("--region", "region_name", required=True, help="Region for the signature.")
@click.option("--directory", "image_directory", required=True, help="Folder of the files.")
@click.option("--bucket", default="", help="Bucket, if neither address nor folder names it.")
@click.option(
    "--access-key",
    "aws_access_key_id",
    required=True,
    envvar="AWS_ACCESS_KEY_ID",
    show_envvar=True,
    help="Access key.",
)
@click.option(
    "--secret-key",
    "aws_secret_access_key",
    required=True,
    envvar="AWS_SECRET_ACCESS_KEY",
    show_envvar=True,
    help="Secret key; better in the environment than on the command line.",
)
@click.option("--check", is_flag=True, help="Store and read a small file first.")
@command
def set_storage(session: Session, *, check: bool, **settings: str) -> None:
    """Have the files of your jobs go to your own S3 storage from now on."""
    told = session.client.admin.update_storage(StorageSettings(**settings), check_connection=check)

    def show() -> None:
        click.echo(f"files go to {told.settings.endpoint_url}")
        if told.warning:
            click.echo(f"Warning: {told.warning}", err=True)

    session.answer({"warning": told.warning}, show)


@admin.command("reset-storage")
@command
def reset_storage(session: Session) -> None:
    """Have the files of your jobs stay with the service from now on."""
    session.client.admin.reset_storage()
    _done(session, "files stay with the service")


def _has_gpus(session: Session) -> bool:
    models = session.client.capabilities().models
    return any(model.device not in ("", "cpu") for model in models)


def _done(session: Session, sentence: str) -> None:
    session.answer({"done": True}, lambda: click.echo(sentence))
