"""Loads and unloads the models of a worker, and runs a worker for each loaded one."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import structlog

from img2img_server import errors
from img2img_server.domain.models import ModelState
from img2img_server.telemetry import MODEL_LOADED, MODEL_WEIGHTS_BYTES
from img2img_server.worker.model_announcements import ModelAnnouncements
from img2img_server.worker.model_demand import Demand
from img2img_server.worker.model_loader import (
    UNLOAD_SECONDS,
    LoadedModel,
    ModelLoader,
    NoRoomError,
)
from img2img_server.worker.model_slot import ModelSlot
from img2img_server.worker.worker import Worker

RETRY_SECONDS: Final = 1.0  # pause before a worker is started again that NATS did not admit

log = structlog.get_logger()

# Returns the worker of a loaded model.
MakeWorker = Callable[[ModelSlot, LoadedModel], Worker]


class ModelWorkers:
    """The workers of the loaded models.

    Args:
        drain_seconds: The longest time that running jobs get when their model is unloaded.

    Attributes:
        ended: Set when a worker ends that was not stopped.
    """

    def __init__(
        self,
        slots: Sequence[ModelSlot],
        loader: ModelLoader,
        make_worker: MakeWorker,
        demand: Demand,
        announcements: ModelAnnouncements,
        drain_seconds: float,
    ) -> None:
        self._slots = slots
        self._loader = loader
        self._make_worker = make_worker
        self._demand = demand
        self._announcements = announcements
        self._drain_seconds = drain_seconds
        self.ended = asyncio.Event()

    def loaded(self) -> list[ModelSlot]:
        """Returns the models that are loaded."""
        return [slot for slot in self._slots if slot.state is ModelState.LOADED]

    async def load(self, slot: ModelSlot) -> bool:
        """Loads a model and serves it. Returns whether it could be loaded."""
        slot.state = ModelState.LOADING
        await self._announcements.announce(slot)
        log.info("model_loading", model=slot.name)
        began = time.monotonic()
        try:
            loaded: LoadedModel | None = await self._loaded(slot)
        except Exception as error:  # the libraries raise errors of many classes
            loaded = None
            await self._announcements.fail(slot, error)
            _forget_traceback(error)
        if loaded is None:  # Here no error is handled that could refer to the weights.
            await self._loader.reclaim()
            return False
        slot.load_seconds = time.monotonic() - began
        slot.size = loaded.size or slot.size
        slot.info, slot.failure, slot.since = loaded.engine.model, "", None
        slot.loaded, slot.loaded_at, slot.state = loaded, time.monotonic(), ModelState.LOADED
        MODEL_LOADED.labels(slot.name).set(1)
        MODEL_WEIGHTS_BYTES.labels(slot.name).set(slot.size)
        log.info(
            "model_loaded", model=slot.name, bytes=slot.size, seconds=round(slot.load_seconds, 1)
        )
        await self._free_memory(slot)
        slot.throughput.restart()
        slot.stop = asyncio.Event()
        slot.worker = self._make_worker(slot, loaded)
        slot.running = asyncio.create_task(self._run_worker(slot.worker, slot.stop))
        slot.running.add_done_callback(lambda task: self._on_worker_end(slot, task))
        return True

    async def unload(self, slot: ModelSlot) -> None:
        """Ends or requeues the jobs of a model and returns its memory."""
        assert slot.worker is not None
        assert slot.running is not None
        assert slot.loaded is not None
        log.info("model_unloading", model=slot.name)
        slot.state = ModelState.COLD
        slot.worker.unload(self._drain_seconds)
        await asyncio.wait({slot.running})  # A cancel of this task must not cancel it.
        slot.running.result()
        loaded, slot.loaded, slot.worker, slot.running = slot.loaded, None, None, None
        slot.info = loaded.engine.model
        names = await self._loader.loras(slot.model)
        slot.refused_loras = frozenset(names) - frozenset(slot.info.loras)
        await self._loader.unload(loaded, UNLOAD_SECONDS)
        del loaded
        await self._loader.reclaim()
        await self._loader.measure()
        MODEL_LOADED.labels(slot.name).set(0)
        MODEL_WEIGHTS_BYTES.labels(slot.name).set(0)
        log.info("model_unloaded", model=slot.name)
        await self._announcements.announce(slot)

    async def _loaded(self, slot: ModelSlot) -> LoadedModel:
        """Loads a model. If the device has too little memory, unloads the others for it."""
        while True:
            try:
                return await self._loader.load(slot.model)
            except NoRoomError:
                others = self.loaded()
                if not others:
                    raise
            await self._unload_oldest(others, slot)

    async def _free_memory(self, slot: ModelSlot) -> None:
        """Unloads other models if the new one needs more memory than its files showed."""
        await self._loader.measure()
        while others := [each for each in self.loaded() if each is not slot]:
            used = sum(each.size for each in others) + slot.size
            if self._loader.has_room(0, 0, used):
                return
            idle = await self._idle(others)
            if not idle and not self._loader.is_full(used):
                return
            await self._unload_oldest(idle or others, slot)

    async def _idle(self, slots: Sequence[ModelSlot]) -> list[ModelSlot]:
        """Returns the models without jobs; none while NATS is down."""
        with suppress(errors.UnavailableError):
            idle = {each.name for each in await self._demand.loaded() if not each.is_busy}
            return [slot for slot in slots if slot.name in idle]
        return []

    async def _unload_oldest(self, others: Sequence[ModelSlot], slot: ModelSlot) -> None:
        oldest = min(others, key=lambda it: it.worker.used_at if it.worker else 0.0)
        log.warning("model_unloaded_for_memory", model=oldest.name, room_for=slot.name)
        await self.unload(oldest)

    async def _run_worker(self, worker: Worker, stop: asyncio.Event) -> None:
        """Runs the worker of a model. If NATS is away when it starts, starts it again."""
        while True:
            try:
                await worker.run(stop)
                return
            except errors.UnavailableError as error:
                if worker.has_lost_device:
                    raise
                log.warning("model_worker_not_started", why=str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS):
                    await stop.wait()
            if stop.is_set() or worker.is_unloading:
                return

    def _on_worker_end(self, slot: ModelSlot, task: asyncio.Task[None]) -> None:
        if slot.running is task and slot.state is ModelState.LOADED and not slot.stop.is_set():
            self.ended.set()


def _forget_traceback(error: BaseException | None) -> None:
    """Removes the references of an error to the weights, which the functions that failed have as
    local variables. The log may keep the error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
