"""Defines the options and the output that all commands share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from img2img_client.channel import (
    DEFAULT_SERVER,
    KEY_VARIABLE,
    SERVER_VARIABLE,
    Endpoint,
    check_certificates,
)
from img2img_client.cli.profiles import PROFILE_VARIABLE, complete_profile, read_config
from img2img_client.cli.program import job_facts, to_json
from img2img_client.client import Client
from img2img_client.diagnosis import Cause
from img2img_client.errors import InvalidArgumentError, UnauthenticatedError, UnavailableError
from img2img_client.requests import job_name
from img2img_client.resources import Job
from img2img_client.resume import Retry

F = TypeVar("F", bound=Callable[..., Any])

DEV_KEY = "dev-key"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
# Causes that a wrong address can have.
_NOT_FOUND = (Cause.HOST_NOT_FOUND, Cause.REFUSED, Cause.UNREACHABLE, Cause.NO_ANSWER)
RETRY = Retry(connect_seconds=3.0)  # shorter than the default: a person waits at the terminal


@dataclass(frozen=True, slots=True)
class Session:
    """One run of a command."""

    client: Client
    as_json: bool

    def answer(self, value: object, show: Callable[[], None]) -> None:
        """Prints the value as JSON, or calls `show`, which prints it for a person."""
        if self.as_json:
            click.echo(to_json(job_facts(value) if isinstance(value, Job) else value))
        else:
            show()


class Seconds(click.ParamType):  # type: ignore[type-arg] # generic since click 8.5
    """A number of seconds above 0."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Returns the number. Raises click.BadParameter."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds > 0):
            self.fail(f"{value!r} is not a number of seconds above 0.", param, ctx)
        return seconds


def read_job(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Returns the name jobs/10000001 for that name or for 10000001. This is the callback of the JOB
    argument.
    """
    try:
        return job_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@dataclass(frozen=True)
class TlsFiles:
    """The PEM files of a connection: the trusted authorities, and the client's own pair."""

    authorities: Path | None
    certificate: Path | None
    key: Path | None


def command(function: F) -> F:
    """Decorates a command: adds the connection options and --json, and passes it a Session."""

    @functools.wraps(function)
    def run(
        profile: str | None,
        server: str,
        api_key: str | None,
        tls: bool,
        ca_file: Path | None,
        tls_name: str | None,
        cert_file: Path | None,
        key_file: Path | None,
        as_json: bool,
        **parameters: Any,
    ) -> None:
        files = TlsFiles(ca_file, cert_file, key_file)
        chosen = _with_profile(profile, Connection(server, api_key, tls, files, tls_name))
        session = Session(_client(chosen), as_json)
        source = click.get_current_context().get_parameter_source
        try:
            with session.client:
                function(session, **parameters)
        except UnavailableError as error:
            is_local = session.client.endpoint.is_loopback
            if error.metadata.get("cause") == Cause.REFUSED and is_local:
                error.add_note("If it is not running, start it with `img2img-server local`.")
            elif error.metadata.get("cause") in _NOT_FOUND:
                given = chosen.source("server")
                if not chosen.own and source("server") is ParameterSource.ENVIRONMENT:
                    given = SERVER_VARIABLE
                error.add_note(f"Check the address: it comes from {given}.")
            raise
        except UnauthenticatedError as error:
            used = "" if chosen.api_key else f"No key was given, so {DEV_KEY} was used. "
            if "api_key" in chosen.own:
                used = f"The key comes from {chosen.source('api_key')}. "
            error.add_note(f"{used}Set your key with --api-key or {KEY_VARIABLE}.")
            raise
        except KeyboardInterrupt:
            raise click.Abort from None

    options = (
        click.option(
            "--profile",
            metavar="NAME",
            envvar=PROFILE_VARIABLE,
            show_envvar=True,
            shell_complete=complete_profile,
            help="The service and key of this name, see `img2img profiles`.",
        ),
        click.option(
            "--server",
            metavar="HOST:PORT",
            envvar=SERVER_VARIABLE,
            default=DEFAULT_SERVER,
            show_default=True,
            show_envvar=True,
            help="Address of the service.",
        ),
        click.option(
            "--api-key",
            metavar="KEY",
            envvar=KEY_VARIABLE,
            show_envvar=True,
            help=f"Your API key. Default for a service on this machine: {DEV_KEY}.",
        ),
        click.option(
            "--tls",
            is_flag=True,
            help="Encrypt the connection and trust the system's certificate authorities.",
        ),
        click.option(
            "--ca-file",
            metavar="FILE",
            type=_FILE,
            help="Encrypt the connection and trust the certificate authorities of this PEM file.",
        ),
        click.option(
            "--tls-name",
            metavar="NAME",
            help="The name in the certificate, if it is not the host of --server.",
        ),
        click.option(
            "--cert-file",
            metavar="FILE",
            type=_FILE,
            help="Your certificate (PEM), for a service that requires one.",
        ),
        click.option("--key-file", metavar="FILE", type=_FILE, help="The key of --cert-file."),
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
        ),
    )
    decorated: Any = run
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Connection:
    """The values of the options that describe the connection.

    Attributes:
        place: The profile, for messages. Empty: there is none.
        own: Names of the settings whose values are those of the profile.
    """

    server: str
    api_key: str | None
    tls: bool
    files: TlsFiles
    tls_name: str | None
    place: str = ""
    own: frozenset[str] = frozenset()

    def source(self, setting: str) -> str:
        """Returns where the value of a setting is, for messages: an option or a profile."""
        if setting in self.own:
            return f"{setting} in {self.place}"
        return f"--{setting.replace('_', '-')}"


def _with_profile(name: str | None, given: Connection) -> Connection:
    """Returns the connection with the values of a profile where no option was given.

    The default profile is used only if no server is named otherwise, so that no service gets the
    key of another one. The environment comes before the default profile and after a named one.

    Raises:
        click.UsageError: there is no such profile, or it is combined with a server.
    """
    source = click.get_current_context().get_parameter_source
    if name is None:
        if source("server") is not ParameterSource.DEFAULT:
            return given
        config = read_config()
        if not config.default:
            return given
        name = config.default
        profile, is_default = config.get(name), True
    elif source("server") is ParameterSource.COMMANDLINE:
        text = "--server cannot be combined with a profile, whose key belongs to another service"
        raise click.UsageError(text)
    else:
        config = read_config()
        profile, is_default = config.get(name), False
    is_key_given = source("api_key") is ParameterSource.COMMANDLINE or (
        is_default and bool(given.api_key)
    )
    key = given.api_key if is_key_given else profile.api_key or given.api_key
    names = (profile.ca_file, profile.cert_file, profile.key_file)
    files = (config.path.parent / Path(name).expanduser() if name else None for name in names)
    own = TlsFiles(*files)
    of_options = {
        "api_key": is_key_given,
        "ca_file": given.files.authorities,
        "cert_file": given.files.certificate,
        "key_file": given.files.key,
        "tls_name": given.tls_name,
    }
    taken = {name for name in of_options if getattr(profile, name) and not of_options[name]}
    return Connection(
        profile.server,
        key,
        given.tls or profile.tls,
        TlsFiles(
            given.files.authorities or own.authorities,
            given.files.certificate or own.certificate,
            given.files.key or own.key,
        ),
        given.tls_name or profile.tls_name or None,
        config.place(name),
        frozenset({"server", *taken}),
    )


def _client(chosen: Connection) -> Client:
    """Returns the client for the options. Raises click.UsageError."""
    files = chosen.files
    if (files.certificate is None) != (files.key is None):
        given = chosen.source("key_file" if files.certificate is None else "cert_file")
        text = f"--cert-file and --key-file must be given together; only {given} was given"
        raise click.UsageError(text)
    roots = _read(files.authorities, chosen.source("ca_file"))
    pair = (
        _read(files.certificate, chosen.source("cert_file")),
        _read(files.key, chosen.source("key_file")),
    )
    hint = chosen.source("ca_file")
    try:
        if roots is not None:
            check_certificates(roots, str(files.authorities))
        hint = ""
        return Client(
            chosen.server,
            api_key=chosen.api_key or _default_key(chosen),
            tls=chosen.tls,
            root_certificates=roots,
            tls_name=chosen.tls_name,
            client_certificate=None if None in pair else tuple(pair),  # type: ignore[arg-type]
            retry=RETRY,
        )
    except InvalidArgumentError as error:
        field = error.violations[0].field
        hint = hint or chosen.source({"client_certificate": "cert_file"}.get(field, field))
        raise click.BadParameter(str(error), param_hint=hint) from error


def _read(file: Path | None, source: str) -> bytes | None:
    """Returns the content of a file. Raises click.BadParameter with the source of its name."""
    try:
        return file.read_bytes() if file else None
    except OSError as error:
        text = f"cannot read {file}: {error.strerror}"
        raise click.BadParameter(text, param_hint=source) from error


def _default_key(chosen: Connection) -> str:
    endpoint = Endpoint(chosen.server)
    if endpoint.is_loopback:
        return DEV_KEY
    profile = f", or api_key in {chosen.place}" if chosen.place else ""
    text = f"{endpoint.server} needs an API key: set it with --api-key or {KEY_VARIABLE}{profile}"
    raise click.UsageError(text)
