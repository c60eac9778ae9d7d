"""The api role: builds its parts, serves, stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from img2img.v1 import admin_service_pb2_grpc, service_pb2_grpc
from img2img_server import errors
from img2img_server.api.admin import AdminServicer
from img2img_server.api.admission import Fetch, image_limits
from img2img_server.api.backlog import Backlog
from img2img_server.api.calls import OpenCalls
from img2img_server.api.cancel import Canceller
from img2img_server.api.disconnects import Disconnects
from img2img_server.api.estimate import Estimator
from img2img_server.api.intake import Intake
from img2img_server.api.interceptors import ServiceInterceptor
from img2img_server.api.keys import KeyRing, load_keys
from img2img_server.api.service import Img2ImgServicer
from img2img_server.api.storage import StorageCalls
from img2img_server.api.watch import Watcher
from img2img_server.api.webhooks import InlineBase64, Webhooks
from img2img_server.api.worker_cache import CachedWorkerRegistry
from img2img_server.certificates import validity_fault
from img2img_server.compat.modelslab import call_names
from img2img_server.compat.modelslab.files import inline
from img2img_server.imaging.fetch import fetch_image
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.lifecycle import unless_stopped
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.ports import host_port, is_wildcard, listeners, reachable
from img2img_server.setting_files import read_bytes
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.telemetry import probe_server
from img2img_server.webhooks.sender import open_sender
from img2img_server.webhooks.signature import Signer

SERVICE_NAMES = ("img2img.v1.Img2ImgService", "img2img.v1.AdminService")
_HEALTH_SECONDS = 2.0
CONNECTION_AGE_MS = 300_000

log = structlog.get_logger()


async def serve_api(
    settings: Settings, stop: asyncio.Event, started: Callable[[str], None] | None = None
) -> None:
    """Serves until `stop` is set. `started` is called with the address, "host:port"."""
    keys = load_keys(settings)
    policy = OutboundPolicy.of(settings)
    fetch = partial(
        fetch_image,
        policy=policy,
        limits=image_limits(settings),
        timeout_seconds=settings.outbound_timeout_seconds,
    )
    signer = Signer(settings.webhook_secret.get_secret_value())
    async with (
        connect_bus(settings, stop=stop) as bus,
        open_sender(policy) as post,
        _texts(settings, stop) as texts,
    ):
        webhooks = Webhooks(post, signer, texts=texts)
        await serve(settings, bus, fetch, webhooks, keys, stop, started)


async def serve(
    settings: Settings,
    bus: Bus,
    fetch: Fetch,
    webhooks: Webhooks,
    keys: KeyRing,
    stop: asyncio.Event,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serves on parts that exist already; the order of stopping stands at the end."""
    backlog = Backlog(bus.queue, bus.workers)
    registry, workers = bus.workers, CachedWorkerRegistry(bus.workers)
    bus = replace(bus, workers=workers)
    canceller = Canceller(bus.jobs, bus.queue, bus.events, bus.control, bus.outbox)
    estimator = Estimator(bus.queue, bus.workers)
    disconnects = Disconnects(
        canceller, bus.control, stop, grace_seconds=settings.disconnect_grace_seconds
    )
    watcher = Watcher(
        bus.jobs,
        bus.events,
        estimator,
        stop,
        most=settings.max_watchers,
        retention_hours=settings.retention_hours,
        heartbeat_seconds=settings.heartbeat_seconds,
    )
    servicer = Img2ImgServicer(
        settings,
        bus.jobs,
        bus.workers,
        Intake(
            settings,
            bus.jobs,
            bus.queue,
            bus.events,
            bus.workers,
            fetch,
            bus.storage,
            backlog,
            bus.rates,
        ),
        watcher,
        canceller,
        disconnects,
        StorageCalls(bus.storage, OutboundPolicy.of(settings)),
        link_base=_link_base(settings),
        outbox=bus.outbox,
    )
    await bus.storage.rotate()
    server = grpc.aio.server(
        interceptors=[ServiceInterceptor(keys, OpenCalls(settings.max_tenant_calls))],
        options=server_options(settings),
    )
    service_pb2_grpc.add_Img2ImgServiceServicer_to_server(servicer, server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminServicer(bus.control, workers, estimator, canceller), server
    )
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    port = _listen(server, settings)
    await server.start()
    async with (
        disconnects.listening(),
        _health(health_servicer, bus, registry, stop) as why_not_ready,
        probe_server(settings, why_not_ready) as probes,
    ):
        address = host_port(settings.grpc_host, port)
        log.info("api serves", address=address, probes=probes)
        if started:
            started(address)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(webhooks.deliverer(settings, bus).run(stop))
            publishing = tasks.create_task(backlog.publish())
            tasks.create_task(watcher.end_streams_at_stop())
            tasks.create_task(disconnects.end_grace_periods_at_stop())
            await stop.wait()
            publishing.cancel()
            # Not serving -> streams end with a hint to resume -> calls and attempts at webhooks
            # under way finish -> closed.
            await health_servicer.enter_graceful_shutdown()
            await server.stop(settings.drain_seconds)
    log.info("api stopped")


@asynccontextmanager
async def _texts(settings: Settings, stop: asyncio.Event) -> AsyncIterator[InlineBase64 | None]:
    """Reads the texts that stand in place of links, where the operator wants that."""
    if not settings.base64_inline:
        yield None
        return
    async with connect_blobs(settings) as blobs:
        await unless_stopped(stop, blobs.start_reading(settings.startup_timeout_seconds))
        yield partial(inline, blobs)


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """Message limits and keepalive: dead callers are noticed after 30 to 90 seconds.

    Not sooner: our own client needs up to 30 seconds to notice the same and to come back, and the
    answer to a ping waits behind a large image on a slow line.

    A connection takes new calls for five minutes; those under way go on for as long as they last.
    So callers look for apis anew, and one that was added gets its share.
    """
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 30_000),  # how long sent data may stay unacknowledged
        ("grpc.http2.ping_timeout_ms", 60_000),  # how long the answer to a ping may take
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # our client sends one every 10 s
        ("grpc.so_reuseport", 0),
    ]


def _listen(server: grpc.aio.Server, settings: Settings) -> int:
    """Returns the port. Raises SettingsError."""
    address = host_port(settings.grpc_host, settings.grpc_port)
    try:
        if settings.tls_cert_file and settings.tls_key_file:
            return server.add_secure_port(address, _credentials(settings))
        return server.add_insecure_port(address)
    except RuntimeError as error:  # without the reason
        (listener, *_) = listeners("api", settings)
        listener.open().close()  # raises it
        fault = f"IMG2IMG_GRPC_PORT: cannot listen on {address}: {error}"
        if settings.tls_cert_file:
            files = f"{settings.tls_cert_file} with {settings.tls_key_file}"
            fault = f"IMG2IMG_TLS_CERT_FILE: gRPC cannot use {files}"
        raise SettingsError(fault) from error


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    assert settings.tls_cert_file, "checked by Settings"
    assert settings.tls_key_file, "checked by Settings"
    try:
        pair = (read_bytes(settings.tls_key_file), read_bytes(settings.tls_cert_file))
    except OSError as error:
        raise SettingsError(
            f"IMG2IMG_TLS_CERT_FILE, IMG2IMG_TLS_KEY_FILE: {error.filename} cannot be read: "
            f"{error.strerror}"
        ) from error
    if fault := validity_fault(pair[1]):
        log.warning(
            "tls_certificate_not_valid",
            reason=f"IMG2IMG_TLS_CERT_FILE: the certificate {fault}: clients will refuse it",
        )
    return grpc.ssl_server_credentials([pair])


def _link_base(settings: Settings) -> str:
    """Returns the base of the links that gRPC callers get."""
    if settings.public_base_url:
        return settings.public_base_url
    base = f"http://{host_port(reachable(settings.http_host), settings.http_port)}"
    if is_wildcard(settings.http_host):
        log.warning(
            "links_for_this_machine_only",
            links=base,
            reason="IMG2IMG_PUBLIC_BASE_URL is not set and IMG2IMG_HTTP_HOST names no address that "
            "callers can connect to: links in gRPC answers work on this machine only",
        )
    return base


_STATES = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


@asynccontextmanager
async def _health(
    servicer: health.aio.HealthServicer, bus: Bus, registry: WorkerRegistry, stop: asyncio.Event
) -> AsyncIterator[Callable[[], str]]:
    """Keeps the health service true: serving while the bus answers. Yields why it does not."""
    serving = has_models = False

    def trouble() -> str:
        if stop.is_set():
            return "stopping"
        return "" if serving else bus.trouble() or "NATS does not answer"

    async def update() -> None:
        nonlocal serving, has_models
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                has_models = bool(await registry.models())
            serving = True
        except (errors.UnavailableError, TimeoutError):
            serving = False
        for name in ("", *SERVICE_NAMES):
            await servicer.set(name, _STATES[serving])
        await servicer.set(call_names.MODELS_SERVICE, _STATES[has_models])

    async def repeat() -> None:
        while True:
            await update()
            await asyncio.sleep(_HEALTH_SECONDS)

    await update()
    task = asyncio.create_task(repeat())
    try:
        yield trouble
    finally:
        task.cancel()
