"""Finds other workers for the running jobs of a worker that stops.

Such a job is requeued with its state, and the worker that pulls it continues with its next step.
See docs/adr/0021-a-stopping-worker-hands-over-its-steps.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress

import structlog

from img2img_server import errors
from img2img_server.domain.models import WorkerInfo
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.worker.deps import WorkerDeps
from img2img_server.worker.execution import JobExecution

LOOK_SECONDS = 0.25  # seconds between two looks for a worker that can continue a job
# A worker that got a job may be announced as idle for this time.
TAKER_PAUSE_SECONDS = 6.0
# Idle workers ask for a job about once a second (nats/jobs.py).
WANTED_SECONDS = 1.5

log = structlog.get_logger()


class HandOver:
    """Requeues running jobs as long as idle workers can continue them."""

    def __init__(self, deps: WorkerDeps, registry: WorkerRegistry, own: WorkerInfo) -> None:
        self._deps = deps
        self._registry = registry
        self._own = own
        self._wanted_at = -WANTED_SECONDS  # when an idle worker asked for a job
        self._used: dict[str, float] = {}  # when a job was requeued for a worker, by its name

    async def run(self, runs: Collection[JobExecution]) -> None:
        """Hands over jobs until the caller cancels it. `runs`: the jobs that are left."""
        while True:
            with suppress(errors.UnavailableError):
                model = self._deps.engine.model.name
                async with self._deps.queue.on_wanted(model, self._note_wanted):
                    await self._run(runs)
            await asyncio.sleep(LOOK_SECONDS)

    async def _note_wanted(self) -> None:
        self._wanted_at = time.monotonic()

    async def _run(self, runs: Collection[JobExecution]) -> None:
        while True:
            moving = [run for run in runs if run.is_worth_moving]
            # A worker that was killed stays announced for a while, but does not ask for jobs.
            is_wanted = time.monotonic() - self._wanted_at < WANTED_SECONDS
            if moving and is_wanted and (taker := await self._taker()):
                self._used[taker.name] = time.monotonic()
                self._wanted_at = -WANTED_SECONDS
                # Jobs that share a batch here share one there, too.
                together = self._deps.engine.next_jobs(())
                chosen = [run for run in moving if run.job_id in together] or moving[:1]
                log.info("jobs_handed_over", jobs=len(chosen), taker=taker.name)
                for run in chosen:
                    run.hand_back()
            await asyncio.sleep(LOOK_SECONDS)

    async def _taker(self) -> WorkerInfo | None:
        """Returns an idle worker that can continue the jobs of this one."""
        now = time.monotonic()
        with suppress(errors.UnavailableError):
            for worker in await self._registry.workers():
                since_used = now - self._used.get(worker.name, -TAKER_PAUSE_SECONDS)
                if worker.can_continue(self._own) and since_used >= TAKER_PAUSE_SECONDS:
                    return worker
        return None
