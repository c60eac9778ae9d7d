"""All roles on this machine: the real servers and the real roles as supervised child processes.

The code path is that of a cluster; only the addresses are chosen here. All files are in the state
folder.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import aiohttp
import structlog
from pydantic import SecretStr

from img2img_server.devstack import LocalServers, LocalServersError, ServerExitedError
from img2img_server.devstack.child import Child
from img2img_server.devstack.files import write_private
from img2img_server.domain.hub_id import HubId
from img2img_server.engine.catalogue import read_catalogue
from img2img_server.engine.diffusers.local_model import find_model
from img2img_server.engine.family import ModelError
from img2img_server.engine.model_spec import ModelDefaults, read_model_spec
from img2img_server.errors import UnavailableError
from img2img_server.exit_reason import logs_reason
from img2img_server.last_line import is_json
from img2img_server.lifecycle import RESTART_CODE, first_of
from img2img_server.nats.topology import needed_payload_bytes
from img2img_server.ports import METRICS_PORTS, host_port, listeners, reachable, reserve
from img2img_server.setting_names import PREFIX
from img2img_server.settings import DEV_KEY, Settings, SettingsError
from img2img_server.storage.vault import new_key

_LOOPBACK_ALLOWED = "127.0.0.0/8, ::1, localhost"
# Settings for another NATS and another bucket, which the roles must not get.
_FOREIGN = {
    PREFIX + name
    for name in (
        *("NATS_USER", "NATS_PASSWORD", "NATS_TOKEN", "NATS_CREDS_FILE"),
        *("NATS_CA_FILE", "NATS_CERT_FILE", "NATS_KEY_FILE", "S3_SESSION_TOKEN"),
    )
}
# In the state folder: settings for another worker, with the credentials of the servers.
WORKER_FILE = "worker.env"
_UPLOAD_BYTES = 2**30
_PLAYGROUND_IMAGE = Path(__file__).parent / "gateway/playground/static/assets/cat.jpg"
_START_SECONDS = 600.0  # seconds; a large model on a slow disk takes minutes
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=2.0)

log = structlog.get_logger()


async def serve_local(
    settings: Settings, stop: asyncio.Event, started: Callable[[str], None] | None = None
) -> None:
    """Serves until `stop` is set or a child dies. Calls `started` with the gRPC address.

    Raises:
        SettingsError: A port is in use.
        UnavailableError: A server does not start, or a child died. The message has its last log
            line.
    """
    settings, metrics_ports = local_settings(settings)
    try:
        # The servers start in the background, while the worker loads its model.
        engines = LocalServers(
            settings.state_dir,
            background=True,
            payload_bytes=needed_payload_bytes(settings.max_side_pixels),
        )
        async with engines, AsyncExitStack() as stack:
            settings = _with_uploads(_with_key(settings, "storage_keys", "storage.key"))
            settings = _with_key(settings, "stream_token_keys", "stream-token.key")
            with logs_reason():
                # A download has no limit of time, but the start of the roles has one.
                downloading = asyncio.create_task(asyncio.to_thread(_download, settings))
                await first_of(stop.wait(), downloading)
            if stop.is_set():
                return
            downloading.result()
            write_private(settings.state_dir / WORKER_FILE, worker_file(settings, engines))
            roles = [_role(name, settings, engines, port) for name, port in metrics_ports.items()]
            for role in roles:  # The roles stop in reverse order: gateway, api, worker.
                stack.push_async_callback(role.stop)
            with logs_reason():
                await first_of(_start(roles), _server_died(engines), stop.wait())
                if not stop.is_set():
                    _announce(settings)
                    if started:
                        started(host_port(settings.grpc_host, settings.grpc_port))
                    running = [_keep_running(role) for role in roles]
                    await first_of(stop.wait(), _server_died(engines), *running)
            log.info("local_stopping")
    except LocalServersError as error:
        raise UnavailableError(str(error)) from error
    log.info("local_stopped")


def local_settings(settings: Settings) -> tuple[Settings, dict[str, int]]:
    """Chooses the ports. Turns the development key on and allows addresses of this machine unless
    keys are configured.

    Args:
        settings: They have passed `setting_checks`.

    Returns:
        The settings of the roles, and the metrics port of each role.

    Raises:
        SettingsError: A port is in use.
    """
    grpc_port, http_port, *metrics_ports = reserve(listeners("local", settings))
    # Other tenants' callers must not reach what listens on this machine.
    allowed = _LOOPBACK_ALLOWED if settings.api_keys_file is None else ""
    ours = settings.model_copy(
        update={
            "dev_key": settings.api_keys_file is None,
            "grpc_port": grpc_port,
            "http_port": http_port,
            "outbound_allow": settings.outbound_allow or allowed,
        }
    )
    return ours, dict(zip(METRICS_PORTS, metrics_ports, strict=True))


def _download(settings: Settings) -> None:
    """Downloads the model of a hub id into the cache, where the worker finds it. Blocks.

    With a catalogue, it downloads the first model; the worker downloads the others while it serves.

    Raises:
        SettingsError: It cannot be downloaded.
    """
    if settings.models_file is not None:
        with suppress(SettingsError):  # The worker serves the other models.
            _download(read_catalogue(settings)[0].settings)
        return
    defaults, found = ModelDefaults.of(settings), None
    try:
        if not Path(settings.model).exists() and HubId.parse(settings.model):
            found = find_model(settings.model, allow_pickles=settings.allow_pickles)
        read_model_spec(settings.model, found, defaults)
    except ModelError as error:
        raise SettingsError(error.mistake) from error


def _with_uploads(settings: Settings) -> Settings:
    """Takes uploads unless the setting says otherwise."""
    if "upload_bytes" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"upload_bytes": _UPLOAD_BYTES})


def _with_key(settings: Settings, name: str, file: str) -> Settings:
    """Adds a key that a setting lacks; it is created once, in a file of mode 600."""
    if getattr(settings, name).get_secret_value():
        return settings
    path = settings.state_dir / file
    if not path.exists():
        write_private(path, new_key())
    return settings.model_copy(update={name: SecretStr(path.read_text().strip())})


def _role(name: str, settings: Settings, engines: LocalServers, metrics_port: int) -> Child:
    probe_url = f"http://{host_port(reachable(settings.metrics_host), metrics_port)}/readyz"
    return Child(
        name,
        [sys.executable, "-m", "img2img_server", name],
        folder=Path.cwd(),
        log=None,
        probe=lambda: _probe(probe_url),
        env=_environment(settings, engines, metrics_port),
        stop_seconds=settings.drain_seconds + 10.0,
    )


def _environment(settings: Settings, engines: LocalServers, metrics_port: int) -> dict[str, str]:
    """Returns our environment with the chosen settings. Credentials are not on a command line,
    which other users can read.
    """
    chosen = {
        "GRPC_PORT": settings.grpc_port,
        "HTTP_PORT": settings.http_port,
        "METRICS_PORT": metrics_port,
        "API_ADDRESS": host_port(reachable(settings.grpc_host), settings.grpc_port),
        "DEFAULT_MODEL": settings.default_model,
        "DEV_KEY": settings.dev_key,
        "OUTBOUND_ALLOW": settings.outbound_allow,
        "NATS_URL": engines.nats_url,
        "S3_ENDPOINT_URL": engines.s3_endpoint_url,
        "S3_ACCESS_KEY": engines.s3_access_key,
        "S3_SECRET_KEY": engines.s3_secret_key,
        "STORAGE_KEYS": settings.storage_keys.get_secret_value(),
        "UPLOAD_BYTES": settings.upload_bytes,
        "STREAM_TOKEN_KEYS": settings.stream_token_keys.get_secret_value(),
        # The standard error of the roles is a pipe, so they cannot detect the terminal.
        "LOG_FORMAT": "json" if is_json(settings.log_format) else "console",
    }
    ours = {key: value for key, value in os.environ.items() if key.upper() not in _FOREIGN}
    return {**ours, **{PREFIX + name: str(value) for name, value in chosen.items()}}


def worker_file(settings: Settings, engines: LocalServers) -> str:
    """Returns the settings that another worker needs to join this service, for a shell."""
    chosen = {
        "NATS_URL": engines.nats_url,
        "S3_ENDPOINT_URL": engines.s3_endpoint_url,
        "S3_ACCESS_KEY": engines.s3_access_key,
        "S3_SECRET_KEY": engines.s3_secret_key,
        "STORAGE_KEYS": settings.storage_keys.get_secret_value(),
        "OUTBOUND_ALLOW": settings.outbound_allow,
    }
    return "".join(f"{PREFIX}{name}={shlex.quote(str(it))}\n" for name, it in chosen.items())


async def _start(roles: list[Child]) -> None:
    """Starts all roles at once. Raises UnavailableError if one ends before it is ready."""
    reason = ""
    try:
        async with asyncio.timeout(_START_SECONDS), asyncio.TaskGroup() as starts:
            for role in roles:
                starts.create_task(role.start())
    except* ServerExitedError as deaths:
        reason = str(deaths.exceptions[0])
    except* TimeoutError:
        reason = f"the roles were not ready in {_START_SECONDS:.0f} s"
    if reason:  # An error that is raised inside except* would become a group.
        raise UnavailableError(reason)


async def _keep_running(role: Child) -> None:
    """Starts a role again each time it ends with the exit code for a restart.

    Raises:
        UnavailableError: It ended for another reason; the message has its last log line.
    """
    while (death := await role.ended()).exit_code == RESTART_CODE:
        log.info("role_restarting", role=role.name)
        try:
            await role.start()
        except ServerExitedError as error:
            raise UnavailableError(str(error)) from error
    raise UnavailableError(str(death))


async def _server_died(engines: LocalServers) -> None:
    """Waits until a server ends.

    Raises:
        UnavailableError: A server ended; the message has its last log line.
        LocalServersError: A server did not start.
    """
    await engines.serving()
    death = await engines.died()
    log.error("server_exited", name=death.name, exit_code=death.exit_code, output=death.log_tail)
    raise UnavailableError(str(death))


async def _probe(url: str) -> None:
    """Returns when the role is ready. Raises an error if it is not."""
    async with aiohttp.ClientSession(timeout=_PROBE_TIMEOUT) as session, session.get(url) as answer:
        answer.raise_for_status()


def _client_command() -> str:
    """Returns the name of the client's command, or its path if a shell would not find this one."""
    installed = Path(sys.executable).with_name("img2img")
    found = shutil.which("img2img")
    if not installed.exists() or (found and os.path.samefile(found, installed)):
        return "img2img"
    return shlex.quote(_short_path(installed))


def _example_image() -> str:
    """Returns the path of an image that exists: that of the clone, else that of the playground."""
    clone = Path("examples/cat.jpg")
    return str(clone) if clone.is_file() else _short_path(_PLAYGROUND_IMAGE)


def _short_path(path: Path) -> str:
    """Returns the path from the working directory if the file is below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _announce(settings: Settings) -> None:
    """Prints the addresses and an example. Programs read the first line."""
    key = DEV_KEY if settings.dev_key else "see IMG2IMG_API_KEYS_FILE"
    http = f"http://{host_port(reachable(settings.http_host), settings.http_port)}"
    grpc = host_port(reachable(settings.grpc_host), settings.grpc_port)
    print(
        f"img2img is ready: gRPC {grpc}, HTTP {http} (docs at {http}/docs), API key {key}",
        flush=True,
    )
    options = "" if settings.dev_key else " --api-key KEY"
    if settings.tls_cert_file:
        options += f" --ca-file {shlex.quote(str(settings.api_ca_file))}"
    if settings.tls_client_ca_file:
        options += f" --cert-file {shlex.quote(str(settings.api_cert_file))}"
        options += f" --key-file {shlex.quote(str(settings.api_key_file))}"
    print(
        f"command: {_client_command()} generate --server {grpc}{options} "
        f'--prompt "an oil painting" --init-image {shlex.quote(_example_image())}',
        flush=True,
    )
    if settings.playground:
        print(f"playground: {http}/", flush=True)
