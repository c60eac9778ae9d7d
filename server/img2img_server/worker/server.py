"""The worker role: loads the model while it connects, runs jobs, drains."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog

from img2img_server.domain.job import State
from img2img_server.engine.base import Engine
from img2img_server.engine.family import ModelError
from img2img_server.engine.model_spec import ModelDefaults, read_model_spec
from img2img_server.engine.options import EngineOptions, limit_spinning
from img2img_server.errors import OperatorError, SafetyCheckError
from img2img_server.exit_reason import logs_reason
from img2img_server.imaging.decoder import ImageDecoder, ThreadDecoder
from img2img_server.imaging.pool import DecoderPool
from img2img_server.lifecycle import unless_stopped
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.safety import safety_checker
from img2img_server.safety.base import SafetyChecker
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.interface import BlobStore
from img2img_server.storage.s3_blobs import S3BlobStore, connect_blobs
from img2img_server.storage.tenant_s3 import TenantS3
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.tasks import background_task
from img2img_server.telemetry import (
    JOBS_ENDED,
    NATS_CALLS,
    OUTCOMES,
    STORE_CALLS,
    count_from_zero,
    probe_server,
)
from img2img_server.worker.deps import WorkerDeps
from img2img_server.worker.dispatch import Dispatcher
from img2img_server.worker.downloads import forget_downloads
from img2img_server.worker.usage import FleetUsage
from img2img_server.worker.worker import Worker

ENGINE_STOP_SECONDS = 2.0
USAGE_SECONDS = 2.0  # longest time to write at the end what tenants have used
HEAD_START_SECONDS = 0.5
# Longer than for an api: losing a running job is expensive, and another NATS server is found soon.
RECONNECT_WAIT_SECONDS = 12.0

log = structlog.get_logger()


async def serve_worker(
    settings: Settings, stop: asyncio.Event, started: Callable[[str], None] | None = None
) -> None:
    """Runs jobs until `stop` is set. Calls `started` with the worker's name once it serves."""
    ready = False
    needs: list[Callable[[], str]] = []  # Each function returns why its part cannot be used.

    def why_not_ready() -> str:
        if stop.is_set():
            return "stopping"
        return "; ".join(filter(None, (why() for why in needs))) if ready else "starting"

    async with (
        probe_server(settings, "worker", why_not_ready) as probes,
        DecoderPool.of(settings) as decoder,
        connect_bus(settings, reconnect_wait_seconds=RECONNECT_WAIT_SECONDS, stop=stop) as bus,
        connect_blobs(settings) as blobs,
    ):
        store = _watched(blobs, settings)
        needs = [bus.trouble, lambda: store.trouble]
        count_from_zero(STORE_CALLS, OUTCOMES)
        count_from_zero(NATS_CALLS, OUTCOMES[:2])
        with logs_reason():
            safety = safety_checker(settings, _source(settings))
            # If the worker is stopped while models load, the loading threads end with the process.
            loading = _load_all(safety, settings, blobs)
            engine = await unless_stopped(stop, loading)
        try:
            states = [state.value for state in State if state.is_terminal]
            count_from_zero(JOBS_ENDED, [engine.model.name], states)
            name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"

            def announced() -> None:
                nonlocal ready
                ready = True
                log.info("worker_serves", worker=name, device=engine.device, probes=probes)
                if started:
                    started(name)

            with logs_reason():
                # NATS may have become unavailable while the model was loaded.
                await unless_stopped(stop, bus.ready(settings.startup_timeout_seconds))
                await work(
                    settings, name, bus, store, engine, safety, stop, announced, decoder=decoder
                )
        finally:
            with suppress(TimeoutError):  # A step that hangs ends with the process.
                async with asyncio.timeout(ENGINE_STOP_SECONDS):
                    await asyncio.to_thread(engine.stop)
    log.info("worker_stopped")


async def _load_all(safety: SafetyChecker, settings: Settings, blobs: S3BlobStore) -> Engine:
    """Loads the models and prepares the bucket at the same time. Raises the first error.

    The check of the bucket starts first, so that a wrong key is reported before torch occupies the
    CPU.
    """
    async with background_task(blobs.prepare(settings.startup_timeout_seconds)) as preparing:
        await asyncio.wait({preparing}, timeout=HEAD_START_SECONDS)
        if preparing.done():
            preparing.result()
        loaded, _ = await asyncio.gather(_load_models(safety, settings), preparing)
        return loaded


async def _load_models(safety: SafetyChecker, settings: Settings) -> Engine:
    """Loads the models, one after the other if both import diffusers, which two threads cannot do
    at once.
    """
    await asyncio.to_thread(_check_device, settings)
    if settings.safety_checker == "model":
        engine = await asyncio.to_thread(_load_engine, settings)
        await _warm_up(safety)
        return engine
    engine, _ = await asyncio.gather(asyncio.to_thread(_load_engine, settings), _warm_up(safety))
    return engine


async def _warm_up(safety: SafetyChecker) -> None:
    try:
        await safety.warm_up()
    except SafetyCheckError as error:
        reason = error.__cause__ or error
        raise SettingsError(f"IMG2IMG_SAFETY_CHECKER: {error}: {reason}") from error


def _source(settings: Settings) -> str:
    try:
        return read_model_spec(settings.model, defaults=ModelDefaults.of(settings)).source
    except ModelError as error:
        raise SettingsError(error.mistake) from error


def _check_device(settings: Settings) -> None:
    limit_spinning()
    from img2img_server.engine.device import device_and_dtype  # importing torch takes seconds

    device_and_dtype(settings.device, settings.dtype)


def _load_engine(settings: Settings) -> Engine:
    from img2img_server.engine.load import load_engine  # importing diffusers takes seconds

    try:
        return load_engine(EngineOptions.of(settings))
    except ModelError as error:
        raise explain_load_error(settings, error) from error
    except OperatorError:
        raise
    except Exception as error:  # the libraries raise errors of many classes
        log.error("model_not_loaded", exc_info=error)
        raise explain_load_error(settings, error) from error


def explain_load_error(settings: Settings, error: Exception) -> OperatorError:
    """Returns the error with which a worker ends if its model cannot be loaded."""
    if isinstance(error, ModelError):
        return SettingsError(error.mistake)
    if isinstance(error, OperatorError):
        return error
    source = settings.model or "the model inside the package"
    return SettingsError(f"IMG2IMG_MODEL: cannot load {source}: {type(error).__name__}: {error}")


def _watched(blobs: BlobStore, settings: Settings) -> WatchedBlobs:
    return WatchedBlobs(
        blobs, wait_seconds=settings.s3_wait_seconds, wait_bytes=settings.s3_wait_bytes
    )


async def work(
    settings: Settings,
    name: str,
    bus: Bus,
    blobs: BlobStore | WatchedBlobs,
    engine: Engine,
    safety: SafetyChecker,
    stop: asyncio.Event,
    announced: Callable[[], None] | None = None,
    *,
    decoder: ImageDecoder | None = None,
) -> None:
    """Runs jobs with these dependencies until `stop` is set. Calls `announced` once apis can find
    the worker. Without a decoder, init images are decoded in threads without limits.
    """
    store = blobs if isinstance(blobs, WatchedBlobs) else _watched(blobs, settings)
    usage = FleetUsage(name, engine.model.name)
    deps = WorkerDeps(
        name=name,
        usage=usage,
        dispatcher=Dispatcher(engine, usage),
        engine=engine,
        queue=bus.queue,
        events=bus.events,
        jobs=bus.jobs,
        blobs=store,
        outbox=bus.outbox,
        ledger=bus.usage,
        states=bus.states,
        probe=bus.probe,
        storage=bus.storage,
        tenant_s3=TenantS3(OutboundPolicy.of(settings)),
        safety=safety,
        safety_threshold=settings.safety_threshold,
        max_attempts=settings.max_attempts,
        retention_hours=settings.retention_hours,
        decoder=decoder or ThreadDecoder(),
        forget_downloads=partial(forget_downloads, settings.model),
    )
    worker = Worker(deps, bus.control, bus.workers, drain_seconds=settings.drain_seconds)
    try:
        await worker.run(stop, announced)
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(USAGE_SECONDS):
                await bus.usage.close()
