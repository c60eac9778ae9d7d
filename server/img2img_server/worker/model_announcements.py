"""Announces the models of a worker that are not loaded, so that callers can name them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img_server import errors
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.errors import OperatorError
from img2img_server.exit_reason import reasons_of
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.telemetry import MODEL_LOAD_FAILURES
from img2img_server.worker.load_errors import explain_load_error
from img2img_server.worker.model_loader import ModelLoader
from img2img_server.worker.model_slot import ModelSlot
from img2img_server.worker.worker import ANNOUNCE_SECONDS, WITHDRAW_SECONDS

log = structlog.get_logger()


class ModelAnnouncements:
    """The announcements of the models that are not loaded. A loaded one is announced by its worker.

    Args:
        swap_seconds: The longest wait for the room of a model that does not fit.
    """

    def __init__(
        self,
        slots: Sequence[ModelSlot],
        loader: ModelLoader,
        registry: WorkerRegistry,
        swap_seconds: float,
    ) -> None:
        self._slots = slots
        self._loader = loader
        self._registry = registry
        self._swap_seconds = swap_seconds

    async def run(self) -> None:
        """Repeats the announcements until it is cancelled."""
        while True:
            for slot in self._slots:
                if slot.running is None and slot.is_found:
                    names = await self._loader.loras(slot.model)
                    offered = tuple(name for name in names if name not in slot.refused_loras)
                    slot.info = replace(slot.info, loras=offered)
                await self.announce(slot)
            await asyncio.sleep(ANNOUNCE_SECONDS)

    async def announce(self, slot: ModelSlot) -> None:
        """Announces a model that is not loaded. The worker of a loaded one announces itself."""
        if slot.running is None and (slot.is_found or slot.failure):
            with suppress(errors.UnavailableError):
                await self._registry.announce(self._info(slot))

    async def fail(self, slot: ModelSlot, error: Exception) -> None:
        """Announces that a model cannot be served, and why."""
        slot.state, slot.failed_at = ModelState.FAILED, time.monotonic()
        reasons = reasons_of(explain_load_error(slot.model.settings, error))
        slot.failure = "; ".join(reasons)
        MODEL_LOAD_FAILURES.labels(slot.name).inc()
        expected = isinstance(error, OperatorError)
        log.error(
            "model_not_loaded",
            model=slot.name,
            why=slot.failure,
            exc_info=None if expected else error,
        )
        await self.announce(slot)

    async def withdraw(self) -> None:
        """Withdraws the announcements of all models of the worker."""
        with suppress(errors.UnavailableError, TimeoutError):
            async with asyncio.timeout(WITHDRAW_SECONDS):
                for slot in self._slots:
                    await self._registry.withdraw(slot.announced_name)

    def _info(self, slot: ModelSlot) -> WorkerInfo:
        loaded = [each for each in self._slots if each.state is ModelState.LOADED]
        used = sum(each.size for each in loaded)
        has_room = self._loader.has_room(slot.size, 0, used)
        device = next((each.loaded.engine.device for each in loaded if each.loaded), "")
        return slot.worker_info(device, 0.0 if has_room else self._swap_seconds)
