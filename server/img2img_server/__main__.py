"""The command `img2img-server`: runs one role. Only this module ends the process.

A plain install has this command too, without the packages that the roles need: before they are
checked, only the standard library and click are imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import click

from img2img_server import __version__
from img2img_server.extras import install_command
from img2img_server.last_line import exit_now, exit_on_signals, exit_with_reasons

PROGRAM: Final = "img2img-server"
# Modules without which a role cannot start, by the extra of pyproject.toml that installs them.
EXTRAS: Final = {
    "server": (
        "aiodns, aiohttp, cryptography, fastapi, fastapi_offline, grpc_health, grpc_reflection, "
        "isal, minio, msgspec, nats, numpy, opentelemetry, PIL, prometheus_client, "
        "pydantic, pydantic_settings, python_multipart, simplejpeg, standardwebhooks, structlog, "
        "typing_extensions, urllib3, uvicorn"
    ),
    "worker": "diffusers, huggingface_hub, safetensors, torch, transformers",
}
INCLUDED: Final = {"server": ("server",), "worker": ("server", "worker")}
# The extra, the module and the function of each role.
ROLES: Final = {
    "api": ("server", "img2img_server.api.server", "serve_api"),
    "gateway": ("server", "img2img_server.gateway.server", "serve_gateway"),
    "worker": ("worker", "img2img_server.worker.server", "serve_worker"),
    "local": ("local", "img2img_server.local", "serve_local"),
}


def _run(name: str) -> None:
    extra, module, function = ROLES[name]
    with _ending(name, extra):
        from img2img_server.lifecycle import run_role
        from img2img_server.setting_checks import checked_settings
        from img2img_server.telemetry import configure_logging
        from img2img_server.tracing import exporting

        settings = checked_settings(name)
        configure_logging(settings, name)
        serve = getattr(import_module(module), function)
        with exporting(settings, name):
            run_role(partial(serve, settings))
        exit_now(0)


@contextmanager
def _ending(name: str, extra: str) -> Iterator[None]:
    """Ends the process when the body raises, with a last line that has the reason."""
    program = f"{PROGRAM} {name}"
    with exit_on_signals(program):
        _require(program, extra)
        from img2img_server.exit_reason import leave

        try:
            yield
        except (SystemExit, click.ClickException, click.exceptions.Exit):
            raise
        except BaseException as error:
            leave(program, error)


def _require(program: str, extra: str) -> None:
    """Ends the process with a message if packages of an extra are not installed."""
    needed = INCLUDED.get(extra, ("server", "worker"))
    missing = [
        module
        for name in needed
        for module in EXTRAS[name].split(", ")
        if find_spec(module) is None
    ]
    if missing:
        reason = (
            f"needs the extra {extra}, of which is not installed: {', '.join(missing)}; "
            f"{install_command(extra)}"
        )
        exit_with_reasons(program, [reason], 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def main() -> None:
    """Image-to-image diffusion as a service. Every setting is an IMG2IMG_ variable."""


@main.command()
def api() -> None:
    """The gRPC server: accepts jobs and streams their events."""
    _run("api")


@main.command()
def gateway() -> None:
    """The REST gateway in front of the api."""
    _run("gateway")


@main.command()
def worker() -> None:
    """A worker with one device: pulls jobs from the queue and runs them."""
    _run("worker")


@main.command()
def local() -> None:
    """All roles on this machine, with their own NATS and S3 server."""
    _run("local")


@main.command()
@click.option(
    "--tenant",
    required=True,
    help="Tenant of the key: 1 to 63 of a-z, 0-9 and -, not beginning with -.",
)
@click.option(
    "--permission",
    "permissions",
    multiple=True,
    type=click.Choice(["storage", "operate", "manage", "unsafe"]),
    help="storage: change the tenant's S3 settings. operate: restart workers, clear caches and the "
    "queue. manage: both. unsafe: turn the safety checker off. May be repeated.",
)
@click.option(
    "--rate-limit",
    type=click.IntRange(min=0),
    help="Jobs a minute that the key may create, 0 for any number. Default: IMG2IMG_RATE_LIMIT.",
)
@click.option("--id", "key_id", default="", help="Names the key in logs and lists.")
@click.option(
    "--label",
    default="",
    help="A text for people, such as the name of the program that has the key.",
)
@click.option(
    "--valid-days",
    type=click.FloatRange(min=0, min_open=True),
    help="The key is refused after this many days. Default: it is valid for ever.",
)
def keys(
    tenant: str,
    permissions: tuple[str, ...],
    rate_limit: int | None,
    key_id: str,
    label: str,
    valid_days: float | None,
) -> None:
    """Make an API key: the key on stderr, its entry for the keys file on stdout."""
    with _ending("keys", "server"):
        from img2img_server.api.keys import new_key
        from img2img_server.settings import SettingsError

        try:
            key, entry = new_key(
                tenant,
                list(permissions),
                rate_limit,
                key_id=key_id,
                label=label,
                expire_time=_in_days(valid_days),
            )
        except SettingsError as error:
            raise click.UsageError(str(error)) from error
    click.echo(f"key (shown only once): {key}", err=True)
    click.echo(entry)


def _in_days(days: float | None) -> datetime | None:
    if days is None:
        return None
    try:
        return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    except OverflowError as error:
        raise click.BadParameter("is after the year 9999", param_hint="--valid-days") from error


@main.command("fetch-model")
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--revision", default="", help="Branch, tag or commit of a hub model.")
@click.option(
    "--parts",
    "only_parts",
    is_flag=True,
    help="Fetch the parts that single files do not hold into FOLDER/FAMILY. SOURCE may be the name "
    "of a family, such as flux.",
)
def fetch_model(source: str, folder: Path, revision: str, only_parts: bool) -> None:
    """Fetch a model once, from s3://bucket/prefix or a hub id, into FOLDER."""
    with _ending("fetch-model", "server"):  # Only hub models need the extra `worker`.
        from img2img_server.setting_checks import checked_settings
        from img2img_server.telemetry import configure_logging

        settings = checked_settings("fetch-model")
        configure_logging(settings, "fetch-model")
        from img2img_server.fetch_model import fetch_model
        from img2img_server.fetch_parts import fetch_parts

        (fetch_parts if only_parts else fetch_model)(settings, source, folder, revision)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> None:
    """Check the models, the LoRAs and the device of a worker, without NATS and S3."""
    with _ending("doctor", "worker"):
        import json

        from img2img_server.setting_checks import mistakes_of
        from img2img_server.settings import Settings
        from img2img_server.telemetry import configure_logging
        from img2img_server.worker.doctor import CatalogueReport, Report, examine

        settings, mistakes, wrong = Settings.load_with_mistakes()
        mistakes += mistakes_of("doctor", settings, skip=wrong)
        configure_logging(settings, "doctor")
        report: Report | CatalogueReport
        report = Report(problems=mistakes) if mistakes else examine(settings)
        text = json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(report.lines())
        click.echo(text)
        raise SystemExit(0 if report.is_fine else 1)


if __name__ == "__main__":
    main()
