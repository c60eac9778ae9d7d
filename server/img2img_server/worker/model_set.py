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
from typing import Final

import structlog

from img2img_server import errors
from img2img_server.domain.models import ModelState
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.errors import OperatorError
from img2img_server.interfaces.queue import Control, JobQueue, ModelCommand, WorkerCommand
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.lifecycle import RestartError, first_of
from img2img_server.telemetry import MODEL_LOAD_FAILURES, MODEL_SWAPS, count_from_zero
from img2img_server.worker.model_announcements import ModelAnnouncements
from img2img_server.worker.model_demand import Demand
from img2img_server.worker.model_loader import ModelLoader
from img2img_server.worker.model_plan import Swap, WantedModel, choose_swap
from img2img_server.worker.model_slot import ModelSlot
from img2img_server.worker.model_workers import MakeWorker, ModelWorkers

# A worker that starts waits so long for a model before it loads a later one of the catalogue.
FIRST_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 0.5  # seconds between two looks at the jobs of models that are not loaded
IDLE_SECONDS: Final = 1.0  # A model without jobs for this time is idle.
# An announcement reaches the other workers within this time, so that only one of them loads a
# model.
SETTLE_SECONDS: Final = 0.1
RESTART_SECONDS: Final = 10.0  # Workers that restart requeue their jobs within this time.

log = structlog.get_logger()


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
        self._announcements = ModelAnnouncements(self._slots, loader, registry, swap_seconds)
        self._workers = ModelWorkers(
            self._slots,
            loader,
            make_worker,
            self._demand,
            self._announcements,
            min(drain_seconds, swap_seconds),
        )
        self._registry = registry
        self._control = control
        self._swap_seconds = swap_seconds
        self._look_seconds = look_seconds
        self._commands: asyncio.Queue[ModelCommand | None] = asyncio.Queue()
        self._restarting = asyncio.Event()

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
                    self._workers.ended.wait(),
                    self._announcements.run(),
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
                await self._workers.load(first)
            if is_starting and self._workers.loaded():
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
        failed = [slot for slot in self._slots if slot.state is ModelState.FAILED]
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
            await self._announcements.announce(slot)
        except Exception as error:  # the libraries raise errors of many classes
            await self._announcements.fail(slot, error)
        finally:
            slot.command = None
            self._commands.put_nowait(command)  # The worker may have waited for this model.

    async def _chosen(self, wanted: Sequence[WantedModel], swap_seconds: float) -> Swap | None:
        """Returns what to load; None if nothing, or if NATS is down: jobs wait."""
        await self._loader.measure()
        used = sum(slot.size for slot in self._workers.loaded())
        with suppress(errors.UnavailableError):
            return choose_swap(
                wanted,
                await self._demand.loaded(),
                lambda size, freed: self._loader.has_room(size, freed, used),
                time.monotonic(),
                swap_seconds,
            )
        return None

    def _slot(self, name: str) -> ModelSlot:
        return next(slot for slot in self._slots if slot.name == name)

    async def _swap(self, swap: Swap) -> None:
        """Unloads and loads models, unless another worker loads the same one just now."""
        slot = self._slot(swap.load)
        if not slot.is_found:  # It is loaded after a later look, when its size is known.
            self._start_finding(slot)
            return
        before, slot.state = slot.state, ModelState.LOADING
        await self._announcements.announce(slot)
        await asyncio.sleep(SETTLE_SECONDS)
        if await self._is_loaded_elsewhere(slot):
            slot.state = before
            await self._announcements.announce(slot)
            return
        for name in swap.unload:
            await self._workers.unload(self._slot(name))
        if await self._workers.load(slot) and swap.unload:
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
        await self._announcements.withdraw()
        for slot in self._slots:
            if slot.loaded:
                await self._loader.unload(slot.loaded)
        for error in ended:
            if isinstance(error, RestartError):
                self._restarting.set()
            elif isinstance(error, BaseException):
                raise error

    # Commands of an operator.

    async def _on_command(self, command: WorkerCommand) -> None:
        """Restarts a process without a loaded model. The workers of loaded models do it, too."""
        if command is WorkerCommand.RESTART:
            self._restarting.set()

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
                    await self._workers.unload(slot)

    async def _load_now(self, slot: ModelSlot) -> None:
        """Loads a model, in place of models with jobs if there is no other room."""
        wanted = WantedModel(name=slot.name, size=slot.size, since=time.monotonic())
        if swap := await self._chosen([wanted], swap_seconds=0.0):
            await self._swap(swap)
