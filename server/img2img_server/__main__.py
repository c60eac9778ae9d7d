"""The command `img2img-server`: runs one role. The only place that exits."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from img2img_server import __version__
from img2img_server.errors import JobFailedError, ServiceError
from img2img_server.lifecycle import RestartError, Role, run_role, start_anew
from img2img_server.settings import Settings, SettingsError
from img2img_server.telemetry import configure_logging
from img2img_server.tracing import exporting


def _run(name: str, role: Callable[[Settings], Role], **overrides: object) -> None:
    try:
        settings = Settings.load(**overrides)
        configure_logging(settings, name)
        with exporting(settings, name):
            code = run_role(role(settings))
    except RestartError:
        start_anew()
    except SettingsError as error:
        click.echo(f"img2img-server {name}: {error}", err=True)
        code = 2
    except (ServiceError, JobFailedError, OSError) as error:
        click.echo(f"img2img-server {name} cannot start or go on: {error}", err=True)
        code = 1
    sys.exit(code)


@click.group()
@click.version_option(__version__, prog_name="img2img-server")
def main() -> None:
    """Image-to-image diffusion as a service. Every setting is an IMG2IMG_ variable."""


@main.command()
def api() -> None:
    """The gRPC server: takes jobs in, streams their events."""
    from img2img_server.api.server import serve_api

    _run("api", lambda settings: partial(serve_api, settings))


@main.command()
def gateway() -> None:
    """The REST gateway in front of the api."""
    from img2img_server.gateway.server import serve_gateway

    _run("gateway", lambda settings: partial(serve_gateway, settings))


@main.command()
def worker() -> None:
    """One device: takes jobs from the queue and runs them."""
    from img2img_server.worker.server import serve_worker

    _run("worker", lambda settings: partial(serve_worker, settings))


@main.command()
def local() -> None:
    """All roles on this machine, with their own NATS and S3 server."""
    from img2img_server.local import serve_local

    _run("local", lambda settings: partial(serve_local, settings))


@main.command()
@click.option("--tenant", required=True, help="Whose key it is: 1 to 63 of a-z, 0-9 and -.")
@click.option(
    "--permission",
    "permissions",
    multiple=True,
    type=click.Choice(["manage", "unsafe"]),
    help="What it may do beside making pictures; may be repeated.",
)
@click.option(
    "--rate-limit",
    type=click.IntRange(min=0),
    help="Jobs a minute that it may make, 0 for any number. Default: IMG2IMG_RATE_LIMIT.",
)
def keys(tenant: str, permissions: tuple[str, ...], rate_limit: int | None) -> None:
    """Make an API key: the key on stderr, its entry for the keys file on stdout."""
    from img2img_server.api.keys import new_key

    key, entry = new_key(tenant, list(permissions), rate_limit)
    click.echo(f"key (shown only once): {key}", err=True)
    click.echo(entry)


@main.command("fetch-model")
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--revision", default="", help="Branch, tag or commit of a hub model.")
def fetch_model(source: str, folder: Path, revision: str) -> None:
    """Fetch a model once, from s3://bucket/prefix or a hub id, into FOLDER."""
    from img2img_server.engine.model_spec import ModelError
    from img2img_server.fetch_model import fetch_model

    # The first process of a container has no default answer to SIGTERM. A draft may be left behind.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        settings = Settings.load()
        configure_logging(settings, "fetch-model")
        fetch_model(settings, source, folder, revision)
    except (SettingsError, ModelError, ServiceError, JobFailedError) as error:
        click.echo(f"img2img-server fetch-model: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
