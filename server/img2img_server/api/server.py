"""The api role: builds the gRPC server, starts it, serves and stops it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, service_pb2, service_pb2_grpc
from img2img_server import errors
from img2img_server.api import convert
from img2img_server.api.admin import AdminServicer
from img2img_server.api.admission import Admission
from img2img_server.api.cancel import Canceller
from img2img_server.api.connections import PeerLimit
from img2img_server.api.deps import ApiDeps, Fetch, downloaded_bytes, service_limits
from img2img_server.api.disconnects import Disconnects
from img2img_server.api.dry_run import DryRun
from img2img_server.api.estimate import Backlog, Estimator
from img2img_server.api.expiry import QueueExpiry
from img2img_server.api.intake import Intake
from img2img_server.api.interceptors import UNARY_CALLS, ServiceInterceptor
from img2img_server.api.keys import KeyRing, load_keys
from img2img_server.api.public import CALLS as PUBLIC_CALLS
from img2img_server.api.quota import Quota
from img2img_server.api.reflection import add_reflection
from img2img_server.api.service import Img2ImgServicer
from img2img_server.api.stream_tokens import StreamTokens
from img2img_server.api.tls import server_credentials
from img2img_server.api.uploads import Uploads
from img2img_server.api.watch import Watcher
from img2img_server.api.worker_cache import CachedWorkerRegistry
from img2img_server.compat.modelslab import names, responses
from img2img_server.compat.modelslab.files import inline
from img2img_server.domain.job import Job
from img2img_server.imaging.decoder import ImageDecoder, ThreadDecoder
from img2img_server.imaging.fetch import fetch_image
from img2img_server.imaging.pool import DecoderPool
from img2img_server.lifecycle import unless_stopped
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.ports import host_port, is_wildcard, listeners, reachable
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.interface import BlobStore
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.tasks import background_task
from img2img_server.telemetry import (
    NATS_CALLS,
    OUTCOMES,
    RPCS,
    WEBHOOKS,
    count_from_zero,
    probe_server,
)
from img2img_server.webhooks.dispatcher import BackoffPolicy, WebhookDispatcher
from img2img_server.webhooks.record import FAILED, RETRYING, SUCCESS
from img2img_server.webhooks.sender import WebhookSender, webhook_sender
from img2img_server.webhooks.signature import Signer

_Status = health_pb2.HealthCheckResponse
SERVICE_NAMES = ("img2img.v1.Img2ImgService", "img2img.v1.AdminService")
_METHODS = tuple(
    method.name
    for module in (service_pb2, admin_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
_COUNTED_CODES = ("OK", "INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED")  # those of alerts
_HEALTH_SECONDS = 2.0
CONNECTION_AGE_MS = 300_000
_HANDSHAKE_MS = 20_000

# Returns the texts of base64 files by their links. Raises StorageError.
InlineBase64 = Callable[[Sequence[str]], Awaitable[list[str]]]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Webhooks:
    """The arguments of the webhook dispatcher. `inline_base64`: replaces links to base64 files by
    their text.
    """

    sender: WebhookSender
    signer: Signer
    backoff: BackoffPolicy = field(default_factory=BackoffPolicy)
    inline_base64: InlineBase64 | None = None


async def serve_api(
    settings: Settings, stop: asyncio.Event, started: Callable[[str], None] | None = None
) -> None:
    """Serves until `stop` is set. Calls `started` with the address, "host:port"."""
    keys = load_keys(settings)
    policy = OutboundPolicy.of(settings)
    fetch = partial(
        fetch_image,
        policy=policy,
        limits=service_limits(settings),
        timeout_seconds=settings.outbound_timeout_seconds,
    )
    signer = Signer(settings.webhook_secret.get_secret_value(), settings.webhook_secrets_file)
    async with (
        DecoderPool.of(settings, wait_seconds=settings.admission_wait_seconds) as decoder,
        connect_bus(settings, stop=stop) as bus,
        _inline_base64(settings, stop) as inline_base64,
        _upload_blobs(settings) as blobs,
    ):
        webhooks = Webhooks(webhook_sender(policy), signer, inline_base64=inline_base64)
        # Modules are not searched for garbage again: each search would pause all streams.
        gc.freeze()
        await serve(
            settings, bus, fetch, webhooks, keys, stop, started, decoder=decoder, blobs=blobs
        )


async def serve(
    settings: Settings,
    bus: Bus,
    fetch: Fetch,
    webhooks: Webhooks,
    keys: KeyRing,
    stop: asyncio.Event,
    started: Callable[[str], None] | None = None,
    *,
    decoder: ImageDecoder | None = None,
    blobs: BlobStore | None = None,
) -> None:
    """Serves with existing dependencies; see `serve_api`. Without a decoder, init images are
    decoded in threads without limits. Without `blobs`, no uploads are taken.
    """
    decoder, limits = decoder or ThreadDecoder(), service_limits(settings)
    downloaded = downloaded_bytes(settings)
    deps = ApiDeps(
        settings=settings,
        bus=bus,
        workers=CachedWorkerRegistry(bus.workers),
        fetch=fetch,
        decoder=decoder,
        policy=OutboundPolicy.of(settings),
        limits=limits,
        link_base=_link_base(settings),
        stop=stop,
        downloaded=downloaded,
        uploads=Uploads(settings, bus.uploads, blobs, decoder, limits, downloaded),
    )
    await ApiServer(deps, webhooks, keys).serve(started)


class ApiServer:
    """The gRPC server of the api with everything that runs next to it."""

    def __init__(self, deps: ApiDeps, webhooks: Webhooks, keys: KeyRing) -> None:
        self._deps = deps
        estimator = Estimator(deps.bus.queue, deps.workers)
        canceller = Canceller(deps.bus)
        self._backlog = Backlog(deps.bus.queue, deps.bus.workers)
        self._expiry = QueueExpiry(deps.bus.queue, canceller, deps.settings.retention_hours)
        self._watcher = Watcher(deps, estimator)
        self._disconnects = Disconnects(deps, canceller)
        self._dispatcher = _dispatcher(deps, webhooks)
        quota = Quota(deps.bus, limit=deps.settings.queue_limit)
        admission = Admission(deps, estimator, quota)
        intake = Intake(deps, admission, self._backlog, quota)
        dry_run = DryRun(deps, admission, estimator)
        secret = deps.settings.stream_token_keys.get_secret_value()
        tokens = StreamTokens(secret, deps.settings.stream_token_seconds, keys)
        servicer = Img2ImgServicer(
            deps, intake, dry_run, self._watcher, canceller, self._disconnects, tokens
        )
        self._health = health.aio.HealthServicer()
        self._server = server = grpc.aio.server(
            interceptors=[ServiceInterceptor(keys, deps.bus.key_uses, tokens, deps.settings)],
            options=server_options(deps.settings),
        )
        service_pb2_grpc.add_Img2ImgServiceServicer_to_server(servicer, server)
        admin = AdminServicer(deps, estimator, canceller, keys)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        add_reflection(server, (*SERVICE_NAMES, health.SERVICE_NAME))

    async def serve(self, started: Callable[[str], None] | None = None) -> None:
        """Serves until the api stops. Calls `started` with the address, "host:port"."""
        async with AsyncExitStack() as resources:
            address = await self._start(resources)
            if started:
                started(address)
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(self._backlog.publish())
                tasks.create_task(self._dispatcher.run(self._deps.stop))
                removing = tasks.create_task(self._watcher.remove_expired_logs())
                expiring = tasks.create_task(self._expiry.run())
                tasks.create_task(self._watcher.end_streams_at_stop())
                tasks.create_task(self._disconnects.end_grace_periods_at_stop())
                await self._deps.stop.wait()
                publishing.cancel()
                removing.cancel()
                expiring.cancel()
                await self._shut_down()
            await self._deps.bus.key_uses.close()
        log.info("api_stopped")

    async def _start(self, resources: AsyncExitStack) -> str:
        settings, bus = self._deps.settings, self._deps.bus
        await bus.storage.rotate()
        port = _listen(self._server, settings)
        await self._server.start()
        await resources.enter_async_context(self._disconnects.listening())
        why_not_ready = await resources.enter_async_context(
            _updated_health(self._health, bus, self._deps.stop)
        )
        count_from_zero(NATS_CALLS, OUTCOMES[:2])
        count_from_zero(WEBHOOKS, (SUCCESS, RETRYING, FAILED))
        count_from_zero(RPCS, _METHODS, _COUNTED_CODES)
        probes = await resources.enter_async_context(probe_server(settings, "api", why_not_ready))
        limit = PeerLimit(port, settings.max_grpc_connections)
        await resources.enter_async_context(background_task(limit.watch()))
        address = host_port(settings.grpc_host, port)
        log.info("api_listening", address=address, probes=probes)
        return address

    async def _shut_down(self) -> None:
        """Reports NOT_SERVING and gives open calls `drain_seconds` to end.

        The watcher and the dispatcher stop at the same time: streams end with a hint to resume, and
        attempts at webhooks finish.
        """
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._deps.settings.drain_seconds)


def _dispatcher(deps: ApiDeps, webhooks: Webhooks) -> WebhookDispatcher:
    async def payload(job: Job) -> bytes:
        message = convert.job(job, retention_hours=deps.settings.retention_hours)
        output = responses.links(message)
        if webhooks.inline_base64 and job.params.base64:
            output = await webhooks.inline_base64(output)
        return responses.webhook(message, output)

    return WebhookDispatcher(
        deps.bus.outbox,
        deps.jobs,
        payload,
        webhooks.sender,
        webhooks.signer,
        webhooks.backoff,
        drain_seconds=deps.settings.drain_seconds,
    )


@asynccontextmanager
async def _inline_base64(
    settings: Settings, stop: asyncio.Event
) -> AsyncIterator[InlineBase64 | None]:
    """Yields a function that reads base64 files, if the setting base64_inline is on."""
    if not settings.base64_inline:
        yield None
        return
    async with connect_blobs(settings) as blobs:
        await unless_stopped(stop, blobs.start_reading(settings.startup_timeout_seconds))
        yield partial(inline, blobs)


@asynccontextmanager
async def _upload_blobs(settings: Settings) -> AsyncIterator[BlobStore | None]:
    """Yields the bucket if uploads are taken. The first upload connects to it."""
    if not settings.upload_bytes:
        yield None
        return
    async with connect_blobs(settings) as blobs:
        yield blobs


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """Returns message limits and keepalive: a dead connection is noticed after 30 to 90 seconds.

    A shorter time would break live connections: our client needs up to 30 seconds to detect the
    loss and reconnect, and on a slow line the ping's response waits behind a large image.

    A connection takes new calls for five minutes; open calls keep it. So callers resolve the name
    of the api again, and a new api gets its share of the calls.

    Requests that no handler reads yet take at most 64 KiB each, see receive.py: with the probe of
    the bandwidth, gRPC would let up to 4 MiB of each arrive.
    """
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 30_000),  # how long sent data may stay unacknowledged
        ("grpc.http2.ping_timeout_ms", 60_000),  # how long the response to a ping may take
        ("grpc.keepalive_permit_without_calls", 1),
        # the client sends a ping every 10 s
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", settings.max_watchers + UNARY_CALLS + PUBLIC_CALLS),
        ("grpc.max_allowed_incoming_connections", settings.max_grpc_connections),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
    ]


def _listen(server: grpc.aio.Server, settings: Settings) -> int:
    """Opens the port and returns its number. Raises SettingsError."""
    address = host_port(settings.grpc_host, settings.grpc_port)
    try:
        if settings.tls_cert_file and settings.tls_key_file:
            return server.add_secure_port(address, server_credentials(settings))
        return server.add_insecure_port(address)
    except RuntimeError as error:  # gRPC's error has no reason.
        (listener, *_) = listeners("api", settings)
        listener.open().close()  # This call raises SettingsError with the reason.
        fault = f"IMG2IMG_GRPC_PORT: cannot listen on {address}: {error}"
        if settings.tls_cert_file:
            files = f"{settings.tls_cert_file} with {settings.tls_key_file}"
            fault = f"IMG2IMG_TLS_CERT_FILE: gRPC cannot use {files}"
        raise SettingsError(fault) from error


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


@asynccontextmanager
async def _updated_health(
    servicer: health.aio.HealthServicer, bus: Bus, stop: asyncio.Event
) -> AsyncIterator[Callable[[], str]]:
    """Reports SERVING while NATS can be used. Yields a function that returns why it cannot."""
    is_serving = has_models = False

    def why_not_ready() -> str:
        if stop.is_set():
            return "stopping"
        return "" if is_serving else bus.trouble() or "NATS does not respond"

    async def update() -> None:
        nonlocal is_serving, has_models
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                has_models = bool(await bus.workers.models())
            await bus.probe()
            is_serving = not bus.trouble()
        except (errors.UnavailableError, TimeoutError):
            is_serving = False
        states = dict.fromkeys(("", *SERVICE_NAMES), is_serving)
        for name, serving in (states | {names.MODELS_SERVICE: has_models}).items():
            await servicer.set(name, _Status.SERVING if serving else _Status.NOT_SERVING)

    async def repeat() -> None:
        while True:
            await asyncio.sleep(_HEALTH_SECONDS)
            await update()

    await update()
    async with background_task(repeat()):
        yield why_not_ready
