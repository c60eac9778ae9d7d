"""The worker role: loads the model while it connects, runs jobs, drains."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import structlog

from img2img_server.domain.job import State
from img2img_server.engine.base import Engine
from img2img_server.engine.catalogue import CatalogueModel, read_catalogue
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
from img2img_server.worker.catalogue_watch import CatalogueWatch
from img2img_server.worker.deps import Throughput, WorkerDeps
from img2img_server.worker.dispatch import Dispatcher
from img2img_server.worker.downloads import forget_downloads
from img2img_server.worker.load_errors import explain_load_error
from img2img_server.worker.lora_prefix import LoraPrefix
from img2img_server.worker.model_loader import EngineLoader, LoadedModel, ModelLoader
from img2img_server.worker.model_set import ModelSet
from img2img_server.worker.model_slot import ModelSlot
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
        name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"

        def announced(device: str) -> None:
            nonlocal ready
            ready = True
            log.info("worker_serves", worker=name, device=device, probes=probes)
            if started:
                started(name)

        roles = _Roles(settings, name, bus, blobs, store, decoder, stop, announced)
        await (roles.serve_catalogue() if settings.models_file else roles.serve_model())
    log.info("worker_stopped")


@asynccontextmanager
async def followed_loras(blobs: S3BlobStore, *models: Settings) -> AsyncIterator[None]:
    """Copies LoRA files of the bucket in the background, if there are prefixes. A prefix that
    cannot be read does not stop the others.

    Args:
        models: The settings of each model. Models with the same folder and prefix share the copies.
    """
    wanted = {
        each.lora_dir: each.lora_s3_prefix
        for each in models
        if each.lora_s3_prefix and each.lora_dir is not None
    }
    async with AsyncExitStack() as stack:
        for folder, prefix in wanted.items():
            following = LoraPrefix(blobs, prefix, folder).follow()
            await stack.enter_async_context(background_task(following))
        yield


@dataclass(frozen=True, slots=True)
class _Roles:
    """The two ways to serve: one model, or the models of a catalogue."""

    settings: Settings
    name: str
    bus: Bus
    blobs: S3BlobStore
    store: WatchedBlobs
    decoder: ImageDecoder
    stop: asyncio.Event
    announced: Callable[[str], None]

    async def serve_model(self) -> None:
        async with followed_loras(self.blobs, self.settings):
            await self._serve_model()

    async def _serve_model(self) -> None:
        settings, bus, stop = self.settings, self.bus, self.stop
        with logs_reason():
            safety = safety_checker(settings, _source(settings))
            # If the worker is stopped while models load, the loading threads end with the process.
            loading = _load_all(safety, settings, self.blobs)
            engine = await unless_stopped(stop, loading)
        try:
            _count_ends_from_zero(engine.model.name)
            with logs_reason():
                # NATS may have become unavailable while the model was loaded.
                await unless_stopped(stop, bus.ready(settings.startup_timeout_seconds))
                await work(
                    settings,
                    self.name,
                    bus,
                    self.store,
                    engine,
                    safety,
                    stop,
                    lambda: self.announced(engine.device),
                    decoder=self.decoder,
                )
        finally:
            with suppress(TimeoutError):  # A step that hangs ends with the process.
                async with asyncio.timeout(ENGINE_STOP_SECONDS):
                    await asyncio.to_thread(engine.stop)

    async def serve_catalogue(self) -> None:
        watch = CatalogueWatch(self.settings)
        with logs_reason():
            models = read_catalogue(self.settings)
        async with (
            background_task(watch.follow()),
            followed_loras(self.blobs, *(model.settings for model in models)),
        ):
            await self._serve_catalogue(models)

    async def _serve_catalogue(self, models: Sequence[CatalogueModel]) -> None:
        settings, stop = self.settings, self.stop
        with logs_reason():
            preparing = _prepared(settings, self.blobs)
            loader = await unless_stopped(stop, preparing)
            _count_ends_from_zero(*(model.name for model in models))
            await unless_stopped(stop, self.bus.ready(settings.startup_timeout_seconds))
            await work_catalogue(
                settings,
                self.name,
                self.bus,
                self.store,
                models,
                loader,
                stop,
                lambda: self.announced(str(settings.device)),
                decoder=self.decoder,
            )


def _count_ends_from_zero(*models: str) -> None:
    count_from_zero(JOBS_ENDED, models, [state.value for state in State if state.is_terminal])


async def _prepared(settings: Settings, blobs: S3BlobStore) -> EngineLoader:
    """Checks the device, and prepares the bucket and the shared safety checker."""
    preparing = blobs.prepare(settings.startup_timeout_seconds)
    await asyncio.gather(asyncio.to_thread(_check_device, settings), preparing)
    loader = EngineLoader(settings)
    await _warm_up(loader)
    return loader


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


async def _warm_up(safety: SafetyChecker | EngineLoader) -> None:
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
    async with _Shared.of(settings, bus, blobs, decoder) as shared:
        worker = shared.worker(name, engine, safety)
        await worker.run(stop, announced)


async def work_catalogue(
    settings: Settings,
    name: str,
    bus: Bus,
    blobs: BlobStore | WatchedBlobs,
    models: Sequence[CatalogueModel],
    loader: ModelLoader,
    stop: asyncio.Event,
    announced: Callable[[], None] | None = None,
    *,
    decoder: ImageDecoder | None = None,
    **intervals: float,
) -> None:
    """Runs jobs of the models of a catalogue as `work` does. `intervals`: those of ModelSet."""
    async with _Shared.of(settings, bus, blobs, decoder) as shared:
        models_of_worker = ModelSet(
            name,
            models,
            loader,
            shared.catalogue_worker,
            bus.queue,
            bus.workers,
            bus.control,
            swap_seconds=settings.model_swap_seconds,
            drain_seconds=settings.drain_seconds,
            **intervals,
        )
        await models_of_worker.run(stop, announced)


@dataclass(frozen=True, slots=True)
class _Shared:
    """The dependencies that all models of a worker share."""

    settings: Settings
    bus: Bus
    store: WatchedBlobs
    decoder: ImageDecoder
    tenant_s3: TenantS3
    device_lost: asyncio.Event

    @classmethod
    @asynccontextmanager
    async def of(
        cls,
        settings: Settings,
        bus: Bus,
        blobs: BlobStore | WatchedBlobs,
        decoder: ImageDecoder | None,
    ) -> AsyncIterator[_Shared]:
        store = blobs if isinstance(blobs, WatchedBlobs) else _watched(blobs, settings)
        tenant_s3 = TenantS3(OutboundPolicy.of(settings))
        shared = cls(settings, bus, store, decoder or ThreadDecoder(), tenant_s3, asyncio.Event())
        try:
            async with background_task(store.watch()):
                yield shared
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(USAGE_SECONDS):
                    await bus.usage.close()

    def worker(self, name: str, engine: Engine, safety: SafetyChecker) -> Worker:
        """Returns the worker of a model of its own process."""
        return self._worker(name, engine, safety, self.settings, Throughput())

    def catalogue_worker(self, slot: ModelSlot, loaded: LoadedModel) -> Worker:
        """Returns the worker of a model that was loaded from a catalogue."""
        return self._worker(
            slot.announced_name,
            loaded.engine,
            loaded.safety,
            slot.model.settings,
            slot.throughput,
            rank=slot.rank,
        )

    def _worker(
        self,
        name: str,
        engine: Engine,
        safety: SafetyChecker,
        settings: Settings,
        throughput: Throughput,
        *,
        rank: int | None = None,
    ) -> Worker:
        bus = self.bus
        usage = FleetUsage(name, engine.model.name)
        deps = WorkerDeps(
            name=name,
            usage=usage,
            dispatcher=Dispatcher(engine, usage),
            engine=engine,
            queue=bus.queue,
            events=bus.events,
            jobs=bus.jobs,
            blobs=self.store,
            outbox=bus.outbox,
            ledger=bus.usage,
            states=bus.states,
            probe=bus.probe,
            storage=bus.storage,
            tenant_s3=self.tenant_s3,
            safety=safety,
            safety_threshold=settings.safety_threshold,
            max_attempts=settings.max_attempts,
            retention_hours=settings.retention_hours,
            decoder=self.decoder,
            forget_downloads=partial(forget_downloads, settings.model),
            throughput=throughput,
            device_lost=self.device_lost,
            rank=rank,
        )
        return Worker(deps, bus.control, bus.workers, drain_seconds=settings.drain_seconds)
