"""The worker role: loads the model while it connects, works, drains."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog

from img2img_server.bus import Bus, connect_bus
from img2img_server.engine.base import Engine
from img2img_server.engine.cpu_threads import wait_briefly
from img2img_server.engine.model_spec import ModelError, read_model_spec
from img2img_server.images.outbound import OutboundPolicy
from img2img_server.lifecycle import first_of
from img2img_server.prompts.base import PromptRewriter
from img2img_server.prompts.choose import worker_rewriter
from img2img_server.safety.base import SafetyChecker
from img2img_server.safety.choose import safety_checker
from img2img_server.settings import Settings, SettingsError
from img2img_server.store.base import BlobStore
from img2img_server.store.blobs_s3 import connect_blobs
from img2img_server.store.tenant_s3 import TenantS3
from img2img_server.tasks import beside
from img2img_server.telemetry import probe_server
from img2img_server.worker.downloads import forget_downloads
from img2img_server.worker.parts import Parts
from img2img_server.worker.worker import Worker

ENGINE_STOP_SECONDS = 2.0
# A job that runs is worth a longer wait than a caller: another server is found within seconds.
BUS_PATIENCE_SECONDS = 12.0

log = structlog.get_logger()


async def serve_worker(
    settings: Settings, stop: asyncio.Event, started: Callable[[str], None] | None = None
) -> None:
    """Works until `stop` is set. `started` is called with the worker's name once it serves."""
    ready = False
    async with (
        probe_server(settings, lambda: ready and not stop.is_set()) as probes,
        connect_bus(settings, patience_seconds=BUS_PATIENCE_SECONDS, stop=stop) as bus,
        connect_blobs(settings) as blobs,
    ):
        safety = safety_checker(settings, _source(settings))
        rewriter = await asyncio.to_thread(worker_rewriter, settings)
        try:
            async with beside(_load_with(safety, settings, blobs)) as loading:
                await first_of(stop.wait(), asyncio.wait([loading]))
                if not loading.done():  # its threads are left to the exit
                    log.info("worker stopped while its model was loaded")
                    return
                engine = loading.result()
        except ModelError as error:
            raise SettingsError(f"IMG2IMG_MODEL: {error}") from error
        try:
            name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"

            def announced() -> None:
                nonlocal ready
                ready = True
                log.info("worker serves", worker=name, device=engine.device, probes=probes)
                if started:
                    started(name)

            await work(settings, name, bus, blobs, engine, safety, rewriter, stop, announced)
        finally:
            with suppress(TimeoutError):  # a step that hangs ends with the process
                async with asyncio.timeout(ENGINE_STOP_SECONDS):
                    await asyncio.to_thread(engine.stop)
    log.info("worker stopped")


async def _load_with(safety: SafetyChecker, settings: Settings, blobs: BlobStore) -> Engine:
    """The engine, beside it the checker warm and the bucket there."""
    engine, _ = await asyncio.gather(_load_both(safety, settings), blobs.prepare())
    return engine


async def _load_both(safety: SafetyChecker, settings: Settings) -> Engine:
    """One after the other where both import diffusers, which two threads cannot do at once."""
    if settings.safety_checker == "model":
        engine = await asyncio.to_thread(_load, settings)
        await safety.warm_up()
        return engine
    engine, _ = await asyncio.gather(asyncio.to_thread(_load, settings), safety.warm_up())
    return engine


def _source(settings: Settings) -> str:
    try:
        return read_model_spec(settings.model).source
    except ModelError as error:
        raise SettingsError(f"IMG2IMG_MODEL: {error}") from error


def _load(settings: Settings) -> Engine:
    wait_briefly()
    from img2img_server.engine.load import load_engine  # imports torch: seconds

    return load_engine(settings)


async def work(
    settings: Settings,
    name: str,
    bus: Bus,
    blobs: BlobStore,
    engine: Engine,
    safety: SafetyChecker,
    rewriter: PromptRewriter,
    stop: asyncio.Event,
    announced: Callable[[], None] | None = None,
) -> None:
    """Works on parts that exist already, until `stop` is set. `announced` is called once, when
    apis can know of it."""
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
    await worker.run(stop, announced)
