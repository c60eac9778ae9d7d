"""Finds the models of a catalogue that have jobs and are not loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from img2img_server.domain.models import ModelState
from img2img_server.interfaces.queue import JobQueue
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.worker.model_plan import LoadedModel, WantedModel
from img2img_server.worker.model_slot import ModelSlot

RETRY_SECONDS: Final = 300.0  # A model that failed is loaded again for a job after this time.


class Demand:
    """The jobs of the models of one worker.

    Args:
        idle_seconds: A model without jobs for this time is idle.
    """

    def __init__(
        self,
        queue: JobQueue,
        registry: WorkerRegistry,
        slots: Sequence[ModelSlot],
        idle_seconds: float,
    ) -> None:
        self._queue = queue
        self._registry = registry
        self._slots = slots
        self._idle_seconds = idle_seconds

    async def wanted(self) -> list[WantedModel]:
        """Returns the models that are not loaded and have jobs. Raises UnavailableError."""
        now = time.monotonic()
        served: dict[str, ModelState] | None = None
        wanted = []
        for slot in self._slots:
            if not _may_be_loaded(slot, now):
                continue
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
        return wanted

    async def loaded(self) -> list[LoadedModel]:
        """Returns the models that are loaded. Raises UnavailableError."""
        found = []
        for slot in self._slots:
            if slot.state is ModelState.LOADED and slot.worker is not None:
                used_at = slot.worker.used_at
                is_used = time.monotonic() - used_at < self._idle_seconds
                found.append(
                    LoadedModel(
                        name=slot.name,
                        size=slot.size,
                        used_at=used_at,
                        loaded_at=slot.loaded_at,
                        is_busy=is_used or (await self._jobs(slot))[1] > 0,
                    )
                )
        return found

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


def _may_be_loaded(slot: ModelSlot, now: float) -> bool:
    if slot.state is ModelState.COLD:
        return slot.is_found
    if slot.state is not ModelState.FAILED or slot.is_searched:
        return False
    return now - slot.failed_at >= RETRY_SECONDS
