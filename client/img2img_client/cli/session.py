"""What every command shares: how to reach the service, how to answer, how to fail."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from img2img_client.channel import DEFAULT_SERVER, Endpoint
from img2img_client.client import Client
from img2img_client.errors import (
    Img2ImgError,
    InvalidRequestError,
    JobEndError,
    RpcError,
    UnavailableError,
)
from img2img_client.request import job_name
from img2img_client.resume import Retry

F = TypeVar("F", bound=Callable[..., Any])

DEV_KEY = "dev-key"
FAILED, WRONG, INTERRUPTED = 1, 2, 130
RETRY = Retry(connect_seconds=3.0)  # somebody waits at the terminal for the first answer


@dataclass(frozen=True, slots=True)
class Session:
    """One run of a command."""

    client: Client
    as_json: bool

    @property
    def is_local(self) -> bool:
        """Whether the service is on this machine."""
        return self.client.endpoint.is_loopback

    def answer(self, value: object, show: Callable[[], None]) -> None:
        """Prints the value as JSON, or shows it to a person."""
        if self.as_json:
            click.echo(to_json(value))
        else:
            show()


def read_job(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Callback of the JOB argument: jobs/10000001 or 10000001."""
    try:
        return job_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def command(function: F) -> F:
    """Gives a command the connection options and --json, calls it with a Session and turns errors
    into sentences and exit codes."""

    @functools.wraps(function)
    def run(
        server: str,
        api_key: str | None,
        tls: bool,
        ca_file: Path | None,
        as_json: bool,
        **parameters: Any,
    ) -> None:
        root_certificates = ca_file.read_bytes() if ca_file else None
        try:
            key = api_key or _default_key(server)
            client = Client(
                server, api_key=key, tls=tls, root_certificates=root_certificates, retry=RETRY
            )
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--server") from error
        session = Session(client, as_json)
        try:
            with client:
                function(session, **parameters)
        except Img2ImgError as error:
            fail(session, error)
        except OSError as error:
            click.echo(f"Error: cannot write {error.filename}: {error.strerror}", err=True)
            raise click.exceptions.Exit(FAILED) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None

    options = (
        click.option(
            "--server",
            metavar="HOST:PORT",
            envvar="IMG2IMG_SERVER",
            default=DEFAULT_SERVER,
            show_default=True,
            show_envvar=True,
            help="Where the service is.",
        ),
        click.option(
            "--api-key",
            metavar="KEY",
            envvar="IMG2IMG_API_KEY",
            show_envvar=True,
            help=f"Your key. Default for a server on this machine: {DEV_KEY}",
        ),
        click.option("--tls", is_flag=True, help="Encrypt; trust the system's authorities."),
        click.option(
            "--ca-file",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Encrypt; trust the authorities of this PEM file instead.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    )
    decorated: Any = run
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def fail(session: Session, error: Img2ImgError) -> NoReturn:
    """Says what is wrong, one line a violation, and exits with 2 when the request is to blame."""
    violations = error.violations if isinstance(error, RpcError) else ()
    for line in [violation.description for violation in violations] or [str(error)]:
        click.echo(f"Error: {line}", err=True)
    if isinstance(error, UnavailableError) and not error.reason and session.is_local:
        click.echo("Is it running? `img2img-server local` starts it on this machine.", err=True)
    if session.as_json:
        click.echo(to_json({"error": error_facts(error)}))
    code = WRONG if isinstance(error, InvalidRequestError) else FAILED
    raise click.exceptions.Exit(code) from error


def error_facts(error: Img2ImgError) -> dict[str, object]:
    """An error as JSON has it."""
    facts: dict[str, object] = {"reason": error.reason, "message": str(error)}
    if isinstance(error, RpcError):
        facts |= {"code": error.code, "metadata": error.metadata}
        facts["retry_seconds"] = error.retry_seconds
        facts["violations"] = [asdict(violation) for violation in error.violations]
    if isinstance(error, JobEndError):
        facts["job"] = error.job.name
    return facts


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


def _default_key(server: str) -> str:
    if Endpoint(server).is_loopback:
        return DEV_KEY
    raise click.UsageError(f"{server} needs an API key: give --api-key or set IMG2IMG_API_KEY")
