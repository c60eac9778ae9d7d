"""`img2img admin ...`: manages the service."""

from __future__ import annotations

import click

from img2img_client.admin import StorageSettings
from img2img_client.cli.program import count
from img2img_client.cli.session import Session, command


@click.group()
def admin() -> None:
    """Manage the service.

    The API key needs the permission `operate`; for details, set-storage and reset-storage the
    permission `storage` is enough.
    """


@admin.command()
@command
def details(session: Session) -> None:
    """Show the version, the models, the queue and the GPU usage of the service."""
    found = session.client.admin.system_details()

    def show() -> None:
        click.echo(f"version {found.server_version}, up {found.uptime_seconds:.0f} s")
        busy = f", GPUs {found.gpu_usage:.0%} busy" if _has_gpus(session) else ""
        click.echo(f"{count(found.model_count, 'model')}{busy}")
        seconds = found.queue_duration_seconds
        click.echo(f"{count(found.queued_jobs, 'queued job')}, about {seconds:.1f} s")

    session.answer(found, show)


@admin.command()
@click.option(
    "--days",
    type=click.IntRange(1, 62),
    default=7,
    show_default=True,
    help="Number of days, today included, in UTC.",
)
@command
def usage(session: Session, *, days: int) -> None:
    """Show what each tenant used on each day."""
    found = session.client.admin.usage(days)

    def show() -> None:
        for each in found.usage:
            price = f", {each.price:.2f} {found.currency}" if found.currency else ""
            used = f"{each.device_seconds:.1f} device s{price}"
            click.echo(f"{each.day} {each.tenant}: {count(each.jobs, 'job')}, {used}")
        if not found.usage:
            click.echo("no usage")

    session.answer(found, show)


@admin.command()
@command
def keys(session: Session) -> None:
    """List the API keys: whose they are, when they expire and when they were used last."""
    found = session.client.admin.keys()

    def show() -> None:
        for each in found:
            facts = [each.tenant, f'"{each.label}"' if each.label else "", *each.permissions]
            if each.expire_time:
                ends = "expired" if each.has_expired else "expires"
                facts.append(f"{ends} {each.expire_time:%Y-%m-%d %H:%M} UTC")
            used = each.last_use_time
            facts.append(f"last used {used:%Y-%m-%d %H:%M} UTC" if used else "not used lately")
            click.echo(f"{each.id}: {', '.join(filter(None, facts))}")

    session.answer({"keys": found}, show)


@admin.command()
@command
def restart(session: Session) -> None:
    """Restart every worker. Running jobs go back to the queue and start again."""
    session.client.admin.restart_server()
    _done(session, "the workers are restarting")


@admin.command()
@command
def update(session: Session) -> None:
    """Restart every worker, so that it reads its settings and model files again."""
    session.client.admin.update_server()
    _done(session, "the workers are restarting and read their settings and models again")


@admin.command("clear-cache")
@command
def clear_cache(session: Session) -> None:
    """Empty the caches of all workers."""
    session.client.admin.clear_cache()
    _done(session, "the workers are emptying their caches")


@admin.group()
def models() -> None:
    """Load and unload models of workers that serve several; `img2img capabilities` lists them."""


_WORKER = click.option("--worker", default="", help="Name of the worker.")


@models.command()
@click.argument("model")
@_WORKER
@command
def load(session: Session, *, model: str, worker: str) -> None:
    """Make a worker load MODEL before a request needs it."""
    workers = session.client.admin.load_model(model, worker)
    text = f"{model} is loaded, or is being loaded, by {', '.join(workers)}"
    session.answer({"workers": workers}, lambda: click.echo(text))


@models.command()
@click.argument("model")
@_WORKER
@command
def unload(session: Session, *, model: str, worker: str) -> None:
    """Make workers unload MODEL; the next request loads it again."""
    workers = session.client.admin.unload_model(model, worker)
    text = f"{model} is being unloaded by {', '.join(workers)}"
    text = text if workers else f"no worker has loaded {model}"
    session.answer({"workers": workers}, lambda: click.echo(text))


@admin.command("clear-queue")
@command
def clear_queue(session: Session) -> None:
    """Fail all your queued jobs."""
    cleared = session.client.admin.clear_queue()
    text = f"{count(cleared, 'queued job')} failed"
    session.answer({"cleared_jobs": cleared}, lambda: click.echo(text))


@admin.command("set-storage")
@click.option("--public-url", required=True, help="Base URL of the links to the images.")
@click.option("--endpoint-url", required=True, help="URL of the S3 server.")
@click.option("--region", "region_name", required=True, help="Region of the S3 server.")
@click.option("--directory", "image_directory", required=True, help="Folder in the bucket.")
@click.option(
    "--bucket", default="", help="Bucket, unless the endpoint URL or the directory names it."
)
@click.option(
    "--access-key",
    "aws_access_key_id",
    required=True,
    envvar="AWS_ACCESS_KEY_ID",
    show_envvar=True,
    help="S3 access key.",
)
@click.option(
    "--secret-key",
    "aws_secret_access_key",
    required=True,
    envvar="AWS_SECRET_ACCESS_KEY",
    show_envvar=True,
    help="S3 secret key. Prefer the environment variable: other users can see command lines.",
)
@click.option("--check", is_flag=True, help="Write and read a small file first, as a test.")
@command
def set_storage(session: Session, *, check: bool, **settings: str) -> None:
    """Store the images of new jobs in your own S3 storage."""
    updated = session.client.admin.update_storage(
        StorageSettings(**settings), check_connection=check
    )

    def show() -> None:
        click.echo(f"images of new jobs are stored at {updated.settings.endpoint_url}")
        if updated.warning:
            click.echo(f"Warning: {updated.warning}", err=True)

    session.answer({"warning": updated.warning}, show)


@admin.command("reset-storage")
@command
def reset_storage(session: Session) -> None:
    """Store the images of new jobs in the storage of the service."""
    session.client.admin.reset_storage()
    _done(session, "images of new jobs are stored by the service")


def _has_gpus(session: Session) -> bool:
    models = session.client.capabilities().models
    return any(model.device not in ("", "cpu") for model in models)


def _done(session: Session, sentence: str) -> None:
    session.answer({"done": True}, lambda: click.echo(sentence))
