"""Keeps the models of a catalogue: loads those with jobs, and unloads others to make room.

A worker serves each loaded model as a worker with one model does. The models that are not loaded
are announced, too, so that callers can name them.

See docs/adr/0022-several-models-on-one-worker.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog

from img2img_server import errors
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.errors import OperatorError
from img2img_server.interfaces.queue import Control, JobQueue, WorkerCommand
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.lifecycle import RestartError, first_of
from img2img_server.tasks import background_task
from img2img_server.telemetry import (
    MODEL_LOAD_FAILURES,
    MODEL_LOADED,
    MODEL_SWAPS,
    MODEL_WEIGHTS_BYTES,
    count_from_zero,
)
from img2img_server.worker.deps import Throughput
from img2img_server.worker.model_loader import LoadedModel, ModelLoader, NoRoomError
from img2img_server.worker.model_plan import LoadedModel as Candidate
from img2img_server.worker.model_plan import Swap, WantedModel, choose_swap
from img2img_server.worker.model_slot import ModelSlot
from img2img_server.worker.worker import ANNOUNCE_SECONDS, WITHDRAW_SECONDS, Worker

LOOK_SECONDS: Final = 0.5  # seconds between two looks at the jobs of models that are not loaded
IDLE_SECONDS: Final = 1.0  # A model without jobs for this time is idle.
# An announcement reaches the other workers within this time, so that only one of them loads a
# model.
SETTLE_SECONDS: Final = 0.1
RESTART_SECONDS: Final = 10.0  # Workers that restart requeue their jobs within this time.
RETRY_SECONDS: Final = 300.0  # A model that failed is loaded again for a job after this time.

log = structlog.get_logger()

# Returns the worker of a loaded model, by the name under which it is announced.
MakeWorker = Callable[[str, LoadedModel, CatalogueModel, Throughput], Worker]


class ModelSet:
    """The models of one worker. It loads one model at a time, while the loaded ones run jobs.

    Args:
        name: The name of the worker process.
        swap_seconds, drain_seconds: See the settings of these names.
        look_seconds, idle_seconds: Intervals, which tests shorten.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[CatalogueModel],
        loader: ModelLoader,
        make_worker: MakeWorker,
        queue: JobQueue,
        registry: WorkerRegistry,
        control: Control,
        *,
        swap_seconds: float,
        drain_seconds: float,
        look_seconds: float = LOOK_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._slots = [ModelSlot(name, model) for model in models]
        self._loader = loader
        self._make_worker = make_worker
        self._queue = queue
        self._registry = registry
        self._control = control
        self._swap_seconds = swap_seconds
        self._drain_seconds = drain_seconds
        self._look_seconds = look_seconds
        self._idle_seconds = idle_seconds
        self._restarting = asyncio.Event()
        self._worker_ended = asyncio.Event()

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] | None = None) -> None:
        """Serves the models until `stop` is set.

        Args:
            ready: Called once, when the first model is loaded or has failed.

        Raises:
            OperatorError: No model can be served.
            RestartError: An operator requested a restart.
            UnavailableError: The device is lost.
        """
        names = [slot.name for slot in self._slots]
        count_from_zero(MODEL_SWAPS, names)
        count_from_zero(MODEL_LOAD_FAILURES, names)
        try:
            async with self._control.on_command(self._on_command):
                await first_of(
                    stop.wait(),
                    self._restarting.wait(),
                    self._worker_ended.wait(),
                    self._announce(),
                    self._serve(ready),
                )
        finally:
            await self._stop()
        if self._restarting.is_set() and not stop.is_set():
            raise RestartError("an operator requested a restart")

    async def _serve(self, ready: Callable[[], None] | None) -> None:
        first, *others = self._slots
        await self._find(first)
        if first.is_found:
            await self._load(first)
        if first.state is ModelState.LOADED and ready:
            ready()
            ready = None
        async with background_task(self._find_all(others)) as finding:
            if ready:  # The first model failed, so that another one must be there.
                await finding
                if all(slot.state is ModelState.FAILED for slot in self._slots):
                    reasons = [f"model {slot.name}: {slot.failure}" for slot in self._slots]
                    raise OperatorError("\n  ".join(["no model can be served:", *reasons]))
                ready()
            while True:
                await asyncio.sleep(self._look_seconds)
                swap = None
                with suppress(errors.UnavailableError):  # NATS is down; jobs wait.
                    swap = await self._choose()
                if swap:
                    await self._swap(swap)

    async def _find_all(self, slots: Sequence[ModelSlot]) -> None:
        for slot in slots:
            await self._find(slot)

    async def _find(self, slot: ModelSlot) -> None:
        """Finds the files of a model and announces it, or the reason why it cannot be served."""
        try:
            found = await self._loader.find(slot.model)
        except Exception as error:  # the libraries raise errors of many classes
            await self._fail(slot, error)
            return
        slot.info, slot.size, slot.is_found = found.info, found.size, True
        with suppress(errors.UnavailableError):
            if known := await self._registry.model(slot.name):
                seconds = known.pixel_step_seconds
                slot.throughput.pixel_step_seconds = seconds
        log.info("model_found", model=slot.name, bytes=slot.size)
        await self._announce_slot(slot)

    async def _fail(self, slot: ModelSlot, error: Exception) -> None:
        slot.state, slot.failed_at = ModelState.FAILED, time.monotonic()
        slot.failure = " ".join((str(error) or type(error).__name__).split())
        MODEL_LOAD_FAILURES.labels(slot.name).inc()
        expected = isinstance(error, OperatorError | NoRoomError)
        log.error(
            "model_not_loaded",
            model=slot.name,
            why=slot.failure,
            exc_info=None if expected else error,
        )
        await self._announce_slot(slot)

    # Which model to load.

    def _in(self, *states: ModelState) -> list[ModelSlot]:
        return [slot for slot in self._slots if slot.state in states]

    async def _choose(self) -> Swap | None:
        now = time.monotonic()
        cold = [slot for slot in self._in(ModelState.COLD) if slot.is_found]
        cold += [s for s in self._in(ModelState.FAILED) if now - s.failed_at >= RETRY_SECONDS]
        served: dict[str, ModelState] | None = None
        wanted = []
        for slot in cold:
            unfinished, waiting = await self._jobs(slot)
            if unfinished and served is None:
                served = await self._served_elsewhere()
            state = served.get(slot.name) if served else None
            is_served = state is not None
            # Another worker runs the jobs that do not wait.
            is_wanted = waiting if is_served else unfinished
            if not is_wanted or state is ModelState.LOADING or is_served != slot.is_served:
                slot.since, slot.is_served = None, is_served
            if not is_wanted or state is ModelState.LOADING:
                continue
            slot.since = now if slot.since is None else slot.since
            wanted.append(
                WantedModel(name=slot.name, size=slot.size, since=slot.since, is_served=is_served)
            )
        if not wanted:
            return None
        loaded = self._in(ModelState.LOADED)
        used = sum(slot.size for slot in loaded)
        return choose_swap(
            wanted,
            [await self._candidate(slot) for slot in loaded],
            lambda size, freed: self._loader.has_room(size, freed, used),
            now,
            self._swap_seconds,
        )

    async def _jobs(self, slot: ModelSlot) -> tuple[int, int]:
        """Returns the numbers of unfinished and of waiting jobs of a model."""
        loads = await self._queue.loads(slot.name)
        unfinished = sum(sum(load.source.jobs.values()) for load in loads)
        return unfinished, sum(load.waiting for load in loads)

    async def _served_elsewhere(self) -> dict[str, ModelState]:
        """Returns the models that other workers have loaded or load now."""
        ours = {slot.announced_name for slot in self._slots}
        found: dict[str, ModelState] = {}
        for worker in await self._registry.workers():
            name, state = worker.model.name, worker.model_state
            if worker.name in ours or worker.store_trouble or state is ModelState.COLD:
                continue
            if found.get(name) is not ModelState.LOADED:
                found[name] = state
        return found

    async def _candidate(self, slot: ModelSlot) -> Candidate:
        assert slot.worker is not None
        used_at = slot.worker.used_at
        is_busy = time.monotonic() - used_at < self._idle_seconds
        if not is_busy:
            _, waiting = await self._jobs(slot)
            is_busy = waiting > 0
        return Candidate(
            name=slot.name,
            size=slot.size,
            used_at=used_at,
            loaded_at=slot.loaded_at,
            is_busy=is_busy,
        )

    # Loading and unloading.

    def _slot(self, name: str) -> ModelSlot:
        return next(slot for slot in self._slots if slot.name == name)

    async def _swap(self, swap: Swap) -> None:
        """Unloads and loads models, unless another worker loads the same one just now."""
        slot = self._slot(swap.load)
        if not slot.is_found:  # It is loaded after the next look, when its size is known.
            slot.state = ModelState.COLD
            await self._find(slot)
            return
        before, slot.state = slot.state, ModelState.LOADING
        await self._announce_slot(slot)
        await asyncio.sleep(SETTLE_SECONDS)
        if await self._is_loaded_elsewhere(slot):
            slot.state = before
            await self._announce_slot(slot)
            return
        for name in swap.unload:
            await self._unload(self._slot(name))
        if await self._load(slot) and swap.unload:
            MODEL_SWAPS.labels(slot.name).inc()

    async def _is_loaded_elsewhere(self, slot: ModelSlot) -> bool:
        """Returns whether a worker with a smaller name loads the model at the same time."""
        with suppress(errors.UnavailableError):
            return any(
                worker.model_state is ModelState.LOADING and worker.name < slot.announced_name
                for worker in await self._registry.workers()
                if worker.model.name == slot.name
            )
        return False

    async def _load(self, slot: ModelSlot) -> bool:
        """Loads a model and serves it. Returns whether it could be loaded."""
        slot.state = ModelState.LOADING
        await self._announce_slot(slot)
        log.info("model_loading", model=slot.name)
        began = time.monotonic()
        try:
            loaded = await self._loaded(slot)
        except Exception as error:  # the libraries raise errors of many classes
            await self._loader.reclaim()
            await self._fail(slot, error)
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
        slot.worker = self._make_worker(slot.announced_name, loaded, slot.model, slot.throughput)
        slot.running = asyncio.create_task(slot.worker.run(slot.stop))
        slot.running.add_done_callback(lambda task: self._on_worker_end(slot, task))
        return True

    async def _loaded(self, slot: ModelSlot) -> LoadedModel:
        """Loads a model. If the device has too little memory, unloads the others for it."""
        while True:
            try:
                return await self._loader.load(slot.model)
            except NoRoomError:
                others = self._in(ModelState.LOADED)
                if not others:
                    raise
            await self._unload_oldest(others, slot)

    async def _free_memory(self, slot: ModelSlot) -> None:
        """Unloads other models if the new one needs more memory than its files showed."""
        while others := [each for each in self._in(ModelState.LOADED) if each is not slot]:
            used = sum(each.size for each in others) + slot.size
            if self._loader.has_room(0, 0, used):
                return
            await self._unload_oldest(others, slot)

    async def _unload_oldest(self, others: Sequence[ModelSlot], slot: ModelSlot) -> None:
        oldest = min(others, key=lambda it: it.worker.used_at if it.worker else 0.0)
        log.warning("model_unloaded_for_memory", model=oldest.name, room_for=slot.name)
        await self._unload(oldest)

    def _on_worker_end(self, slot: ModelSlot, task: asyncio.Task[None]) -> None:
        if slot.running is task and slot.state is ModelState.LOADED and not slot.stop.is_set():
            self._worker_ended.set()

    async def _unload(self, slot: ModelSlot) -> None:
        """Ends or requeues the jobs of a model and returns its memory."""
        assert slot.worker is not None
        assert slot.running is not None
        assert slot.loaded is not None
        log.info("model_unloading", model=slot.name)
        slot.state = ModelState.COLD
        slot.worker.unload(min(self._drain_seconds, self._swap_seconds))
        await asyncio.wait({slot.running})  # A cancel of this task must not cancel it.
        slot.running.result()
        loaded, slot.loaded, slot.worker, slot.running = slot.loaded, None, None, None
        slot.info = loaded.engine.model
        names = await self._loader.loras(slot.model)
        slot.refused_loras = frozenset(names) - frozenset(slot.info.loras)
        await self._loader.unload(loaded)
        del loaded
        await self._loader.reclaim()
        MODEL_LOADED.labels(slot.name).set(0)
        MODEL_WEIGHTS_BYTES.labels(slot.name).set(0)
        log.info("model_unloaded", model=slot.name)
        await self._announce_slot(slot)

    async def _stop(self) -> None:
        """Ends the workers of the loaded models, withdraws the announcements of the others, and
        raises the error of a worker that failed.
        """
        running = [slot.running for slot in self._slots if slot.running]
        if self._restarting.is_set() and running:  # They got the command, too.
            await asyncio.wait(running, timeout=RESTART_SECONDS)
        for slot in self._slots:
            slot.stop.set()
        ended = await asyncio.gather(*running, return_exceptions=True)
        with suppress(errors.UnavailableError, TimeoutError):
            async with asyncio.timeout(WITHDRAW_SECONDS):
                for slot in self._slots:
                    await self._registry.withdraw(slot.announced_name)
        for slot in self._slots:
            if slot.loaded:
                await self._loader.unload(slot.loaded)
        for error in ended:
            if isinstance(error, RestartError):
                self._restarting.set()
            elif isinstance(error, BaseException):
                raise error

    async def _on_command(self, command: WorkerCommand) -> None:
        """Restarts a process without a loaded model. The workers of loaded models do it, too."""
        if command is WorkerCommand.RESTART:
            self._restarting.set()

    # Announcements.

    async def _announce(self) -> None:
        while True:
            for slot in self._slots:
                if slot.running is None and slot.is_found:
                    names = await self._loader.loras(slot.model)
                    offered = tuple(name for name in names if name not in slot.refused_loras)
                    slot.info = replace(slot.info, loras=offered)
                await self._announce_slot(slot)
            await asyncio.sleep(ANNOUNCE_SECONDS)

    async def _announce_slot(self, slot: ModelSlot) -> None:
        """Announces a model that is not loaded. The worker of a loaded one announces itself."""
        if slot.running is None and (slot.is_found or slot.failure):
            with suppress(errors.UnavailableError):
                await self._registry.announce(self._info(slot))

    def _info(self, slot: ModelSlot) -> WorkerInfo:
        loaded = self._in(ModelState.LOADED)
        used = sum(each.size for each in loaded)
        has_room = self._loader.has_room(slot.size, 0, used)
        device = next((each.loaded.engine.device for each in loaded if each.loaded), "")
        return slot.worker_info(device, 0.0 if has_room else self._swap_seconds)
