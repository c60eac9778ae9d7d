"""Runs the gateway role: builds its components, serves and stops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial

import structlog
import uvicorn
from fastapi import FastAPI

from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.app import create_app
from img2img_server.gateway.http.connections import KEEP_ALIVE_SECONDS, BoundedProtocol
from img2img_server.gateway.readiness import Readiness
from img2img_server.lifecycle import first_of, unless_stopped
from img2img_server.ports import BACKLOG, host_port, listeners
from img2img_server.settings import Settings
from img2img_server.storage.interface import BlobStore
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.tasks import background_task
from img2img_server.telemetry import OUTCOMES, STORE_CALLS, count_from_zero, probe_server

# Each new connection takes a millisecond or two. Other requests get their turn after this number.
_ACCEPTED_AT_ONCE = 16
log = structlog.get_logger()


async def serve_gateway(
    settings: Settings, stop: asyncio.Event, started: Callable[[str], None] | None = None
) -> None:
    """Serves until `stop` is set. Calls `started` with the address, "host:port"."""
    async with connect_blobs(settings) as blobs:
        await unless_stopped(stop, blobs.start_reading(settings.startup_timeout_seconds))
        await serve(settings, blobs, stop, started)


async def serve(
    settings: Settings,
    blobs: BlobStore,
    stop: asyncio.Event,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serves files from an existing store. Raises SettingsError if the address is taken.

    `stop` ends waiting requests and event streams. Then no new connections are accepted, and the
    other requests finish.
    """
    settings.refuse_open_dev_key(settings.http_host)
    (listener, *_) = listeners("gateway", settings)
    opened = listener.open()
    opened.setblocking(False)
    address = host_port(settings.http_host, opened.getsockname()[1])
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(connect(settings))
        readiness = Readiness(channel, blobs, stop)
        count_from_zero(STORE_CALLS, OUTCOMES)
        probing = probe_server(settings, "gateway", readiness.why_not)
        probes = await stack.enter_async_context(probing)
        app = create_app(settings, channel, blobs, stop, readiness)
        server = _Server(_config(app, settings))
        await stack.enter_async_context(background_task(readiness.watch()))
        serving = asyncio.create_task(server.serve(sockets=[opened]))
        log.info("gateway_listening", address=address, probes=probes)
        if started:
            started(address)
        await first_of(asyncio.wait([serving]), stop.wait())
        server.should_exit = True
        await serving
    log.info("gateway_stopped")


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the lifecycle of the role."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(BACKLOG)  # asyncio has set it to the number that it accepts at a time.

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        ws="none",  # The middleware then gets HTTP requests only.
        log_config=None,
        access_log=False,
        server_header=False,
        http=partial(BoundedProtocol, app.state.connections),  # type: ignore[arg-type]
        forwarded_allow_ips=list(settings.trusted_proxy_networks),
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
