"""The worker role: loads the model while it connects, works, drains."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from functools import partial

import structlog

from img2img_server.bus import Bus, connect_bus
from img2img_server.engine.base import Engine
from img2img_server.engine.model_spec import ModelError, read_model_spec
from img2img_server.images.outbound import OutboundPolicy
from img2img_server.prompts.base import PromptRewriter
from img2img_server.prompts.choose import worker_rewriter
from img2img_server.safety.base import SafetyChecker
from img2img_server.safety.choose import safety_checker
from img2img_server.settings import Settings, SettingsError
from img2img_server.store.base import BlobStore
from img2img_server.store.blobs_s3 import connect_blobs
from img2img_server.store.tenant_s3 import TenantS3
from img2img_server.telemetry import probe_server
from img2img_server.worker.downloads import forget_downloads
from img2img_server.worker.parts import Parts
from img2img_server.worker.worker import Worker

log = structlog.get_logger()


async def serve_worker(
    settings: Settings, stop: asyncio.Event, started: Callable[[str], None] | None = None
) -> None:
    """Works until `stop` is set. `started` is called with the worker's name once it is warm."""
    from img2img_server.engine.load import load_engine  # imports torch: seconds

    ready = False
    async with (
        probe_server(settings, lambda: ready and not stop.is_set()) as probes,
        connect_bus(settings) as bus,
        connect_blobs(settings) as blobs,
    ):
        safety = safety_checker(settings, _source(settings))
        rewriter = await asyncio.to_thread(worker_rewriter, settings)
        try:
            engine, _, _ = await asyncio.gather(
                asyncio.to_thread(load_engine, settings), blobs.prepare(), safety.warm_up()
            )
        except ModelError as error:
            raise SettingsError(f"IMG2IMG_MODEL: {error}") from error
        try:
            name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
            log.info("worker is warm", worker=name, device=engine.device, probes=probes)
            ready = True
            if started:
                started(name)
            await work(settings, name, bus, blobs, engine, safety, rewriter, stop)
        finally:
            await asyncio.to_thread(engine.stop)
    log.info("worker stopped")


def _source(settings: Settings) -> str:
    try:
        return read_model_spec(settings.model).source
    except ModelError as error:
        raise SettingsError(f"IMG2IMG_MODEL: {error}") from error


async def work(
    settings: Settings,
    name: str,
    bus: Bus,
    blobs: BlobStore,
    engine: Engine,
    safety: SafetyChecker,
    rewriter: PromptRewriter,
    stop: asyncio.Event,
) -> None:
    """Works on parts that exist already, until `stop` is set."""
    parts = Parts(
        name=name,
        engine=engine,
        queue=bus.queue,
        events=bus.events,
        jobs=bus.jobs,
        blobs=blobs,
        outbox=bus.outbox,
        storage=bus.storage,
        tenant_s3=TenantS3(OutboundPolicy.parse(settings.outbound_allow)),
        safety=safety,
        safety_threshold=settings.safety_threshold,
        max_attempts=settings.max_attempts,
        rewriter=rewriter,
        retention_hours=settings.retention_hours,
        forget_downloads=partial(forget_downloads, settings.model),
    )
    worker = Worker(parts, bus.control, bus.workers, drain_seconds=settings.drain_seconds)
    await worker.run(stop)
