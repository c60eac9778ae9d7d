"""Keeps the models of a catalogue: loads those with jobs, and unloads others to make room.

A worker serves each loaded model as a worker with one model does. The models that are not loaded
are announced, too, so that callers can name them.

See docs/adr/0022-several-models-on-one-worker.md.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog

from img2img_server import errors
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.errors import OperatorError
from img2img_server.interfaces.queue import Control, JobQueue, ModelCommand, WorkerCommand
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.lifecycle import RestartError, first_of
from img2img_server.telemetry import (
    MODEL_LOAD_FAILURES,
    MODEL_LOADED,
    MODEL_SWAPS,
    MODEL_WEIGHTS_BYTES,
    count_from_zero,
)
from img2img_server.worker.model_demand import Demand
from img2img_server.worker.model_loader import (
    UNLOAD_SECONDS,
    LoadedModel,
    ModelLoader,
    NoRoomError,
)
from img2img_server.worker.model_plan import Swap, WantedModel, choose_swap
from img2img_server.worker.model_slot import ModelSlot
from img2img_server.worker.worker import ANNOUNCE_SECONDS, WITHDRAW_SECONDS, Worker

# A worker that starts waits so long for a model before it loads a later one of the catalogue.
FIRST_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 0.5  # seconds between two looks at the jobs of models that are not loaded
IDLE_SECONDS: Final = 1.0  # A model without jobs for this time is idle.
# An announcement reaches the other workers within this time, so that only one of them loads a
# model.
SETTLE_SECONDS: Final = 0.1
RETRY_SECONDS: Final = 1.0  # pause before a worker is started again that NATS did not admit
RESTART_SECONDS: Final = 10.0  # Workers that restart requeue their jobs within this time.

log = structlog.get_logger()

# Returns the worker of a loaded model.
MakeWorker = Callable[[ModelSlot, LoadedModel], Worker]


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
        self._slots = [ModelSlot(name, model, rank) for rank, model in enumerate(models)]
        self._demand = Demand(queue, registry, self._slots, idle_seconds)
        self._loader = loader
        self._make_worker = make_worker
        self._registry = registry
        self._control = control
        self._swap_seconds = swap_seconds
        self._drain_seconds = drain_seconds
        self._look_seconds = look_seconds
        self._commands: asyncio.Queue[ModelCommand | None] = asyncio.Queue()
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
            async with (
                self._control.on_command(self._on_command),
                self._control.on_model_command(self._on_model_command),
            ):
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
        for slot in self._slots:
            self._start_finding(slot)
        is_starting = True
        while True:
            if is_starting and (first := self._first()):
                await self._load(first)
            if is_starting and self._in(ModelState.LOADED):
                is_starting = False
                if ready:
                    ready()
            if is_starting and self._has_failed():
                reasons = [f"model {slot.name}: {slot.failure}" for slot in self._slots]
                raise OperatorError("\n  ".join(["no model can be served:", *reasons]))
            if command := await self._next_command():
                await self._execute(command)
                continue
            wanted: list[WantedModel] = []
            with suppress(errors.UnavailableError):  # NATS is down; jobs wait.
                wanted = await self._demand.wanted()
            if wanted and (swap := await self._chosen(wanted, self._swap_seconds)):
                await self._swap(swap)

    def _has_failed(self) -> bool:
        """Returns whether no model can be served."""
        failed = self._in(ModelState.FAILED)
        return len(failed) == len(self._slots) and not any(slot.is_searched for slot in failed)

    def _first(self) -> ModelSlot | None:
        """Returns the model to load when the worker starts: the first one of the catalogue whose
        files are there. Earlier ones whose files are still searched get a few seconds.
        """
        found = [slot for slot in self._slots if slot.is_found and slot.state is ModelState.COLD]
        if not found:
            return None
        is_due = time.monotonic() - min(slot.found_at for slot in found) >= FIRST_SECONDS
        earlier = self._slots[: found[0].rank]
        return found[0] if is_due or not any(slot.is_searched for slot in earlier) else None

    def _start_finding(self, slot: ModelSlot, then: ModelCommand | None = None) -> None:
        """Finds the files of a model in the background, as a download may take hours. Executes
        the command once they are found.
        """
        slot.command = then or slot.command
        if not slot.is_searched:
            slot.finding = asyncio.create_task(self._find(slot))

    async def _find(self, slot: ModelSlot) -> None:
        """Finds the files of a model and announces it, or the reason why it cannot be served."""
        command: ModelCommand | None = None
        try:
            found = await self._loader.find(slot.model)
            slot.info, slot.size = found.info, found.size
            slot.is_found, slot.found_at, slot.state = True, time.monotonic(), ModelState.COLD
            command = slot.command
            with suppress(errors.UnavailableError):
                if known := await self._registry.model(slot.name):
                    slot.throughput.pixel_step_seconds = known.pixel_step_seconds
            log.info("model_found", model=slot.name, bytes=slot.size)
            await self._announce_slot(slot)
        except Exception as error:  # the libraries raise errors of many classes
            await self._fail(slot, error)
        finally:
            slot.command = None
            self._commands.put_nowait(command)  # The worker may have waited for this model.

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

    def _in(self, *states: ModelState) -> list[ModelSlot]:
        return [slot for slot in self._slots if slot.state in states]

    async def _chosen(self, wanted: Sequence[WantedModel], swap_seconds: float) -> Swap | None:
        """Returns what to load; None if nothing, or if NATS is down: jobs wait."""
        await self._loader.measure()
        used = sum(slot.size for slot in self._in(ModelState.LOADED))
        with suppress(errors.UnavailableError):
            return choose_swap(
                wanted,
                await self._demand.loaded(),
                lambda size, freed: self._loader.has_room(size, freed, used),
                time.monotonic(),
                swap_seconds,
            )
        return None

    # Loading and unloading.

    def _slot(self, name: str) -> ModelSlot:
        return next(slot for slot in self._slots if slot.name == name)

    async def _swap(self, swap: Swap) -> None:
        """Unloads and loads models, unless another worker loads the same one just now."""
        slot = self._slot(swap.load)
        if not slot.is_found:  # It is loaded after a later look, when its size is known.
            self._start_finding(slot)
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
            loaded: LoadedModel | None = await self._loaded(slot)
        except Exception as error:  # the libraries raise errors of many classes
            loaded = None
            await self._fail(slot, error)
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
        await self._loader.measure()
        while others := [each for each in self._in(ModelState.LOADED) if each is not slot]:
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
        await self._unload(oldest)

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
        await self._loader.unload(loaded, UNLOAD_SECONDS)
        del loaded
        await self._loader.reclaim()
        await self._loader.measure()
        MODEL_LOADED.labels(slot.name).set(0)
        MODEL_WEIGHTS_BYTES.labels(slot.name).set(0)
        log.info("model_unloaded", model=slot.name)
        await self._announce_slot(slot)

    async def _stop(self) -> None:
        """Ends the workers of the loaded models, withdraws the announcements of the others, and
        raises the error of a worker that failed.
        """
        finding = [slot.finding for slot in self._slots if slot.finding]
        for task in finding:
            task.cancel()
        await asyncio.gather(*finding, return_exceptions=True)
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

    # Commands of an operator.

    async def _on_model_command(self, command: ModelCommand) -> None:
        self._commands.put_nowait(command)

    async def _next_command(self) -> ModelCommand | None:
        """Waits for a command until it is time to look at the jobs; then returns None, as after a
        model was found.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._look_seconds):
                return await self._commands.get()
        return None

    async def _execute(self, command: ModelCommand) -> None:
        """Loads or unloads a model, if it is one of this worker."""
        for slot in self._slots:
            if slot.announced_name != command.worker:
                continue
            log.info("model_command_received", model=slot.name, loads=command.loads)
            if command.loads and slot.state in (ModelState.COLD, ModelState.FAILED):
                if slot.is_found:
                    await self._load_now(slot)
                else:
                    self._start_finding(slot, command)
            elif not command.loads:
                slot.command = None
                if slot.state is ModelState.LOADED:
                    await self._unload(slot)

    async def _load_now(self, slot: ModelSlot) -> None:
        """Loads a model, in place of models with jobs if there is no other room."""
        wanted = WantedModel(name=slot.name, size=slot.size, since=time.monotonic())
        if swap := await self._chosen([wanted], swap_seconds=0.0):
            await self._swap(swap)

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


def _forget_traceback(error: BaseException | None) -> None:
    """Removes the references of an error to the weights, which the functions that failed have as
    local variables. The log may keep the error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
