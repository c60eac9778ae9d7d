"""Pulls jobs to the engine's free capacity, runs them, and lets go of them when it stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img_server import errors
from img2img_server.domain.models import WorkerInfo
from img2img_server.domain.params import Lane
from img2img_server.interfaces.queue import Control, Delivery, WorkerCommand
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.lifecycle import RestartError, first_of
from img2img_server.telemetry import JOBS_RUNNING
from img2img_server.worker.deps import Utilization, WorkerDeps
from img2img_server.worker.execution import JobExecution
from img2img_server.worker.orphan_cleanup import OrphanCleanup

ANNOUNCE_SECONDS = 5.0
PULL_END_SECONDS = 2.0
WITHDRAW_SECONDS = 3.0
HAND_BACK_SECONDS = 5.0  # for the step or upload under way when the drain time is over
LEFTOVERS_SECONDS = 2.0  # for deleting what failed jobs have stored
_PULL_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_LANES = (Lane.REALTIME, Lane.BATCH)

log = structlog.get_logger()


class Worker:
    """One engine's share of the queue. It stops pulling when its jobs fill a batch."""

    def __init__(
        self, parts: WorkerDeps, control: Control, registry: WorkerRegistry, *, drain_seconds: float
    ) -> None:
        self._parts = parts
        self._control = control
        self._registry = registry
        self._drain_seconds = drain_seconds
        self._runs: dict[int, JobExecution] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._leftovers = OrphanCleanup(parts.jobs, parts.blobs)
        self._changed = asyncio.Event()
        self._restarting = asyncio.Event()

    async def run(self, stop: asyncio.Event, announced: Callable[[], None] | None = None) -> None:
        """Works until `stop` is set, then finishes or hands back what it has.

        Args:
            announced: called once, when it has been announced and takes jobs.

        Raises:
            RestartError: an operator asked for a restart, and its jobs are handed back.
            UnavailableError: its device is lost; others have its jobs.
        """
        async with (
            self._control.on_cancel(self._on_cancel),
            self._control.on_command(self._on_command),
            asyncio.TaskGroup() as tasks,
        ):
            sweeping = tasks.create_task(self._leftovers.run())
            watching = tasks.create_task(self._parts.blobs.watch())
            announcing = tasks.create_task(self._announce(announced))
            pulling = tasks.create_task(self._pull(tasks))
            lost = self._parts.device_lost
            await first_of(stop.wait(), self._restarting.wait(), lost.wait())
            # Not announced -> not pulling -> runs finish in time or are handed back -> swept up.
            announcing.cancel()
            pulling.cancel()
            await asyncio.wait({pulling}, timeout=PULL_END_SECONDS)
            with suppress(errors.UnavailableError, TimeoutError):
                async with asyncio.timeout(WITHDRAW_SECONDS):  # it expires by itself
                    await self._registry.withdraw(self._parts.name)
            at_leisure = stop.is_set() and not lost.is_set()
            await self._drain(self._drain_seconds if at_leisure else 0.0)
            await self._leftovers.finish(LEFTOVERS_SECONDS)
            sweeping.cancel()
            watching.cancel()
        if lost.is_set():
            raise errors.UnavailableError("the device is lost; only a new process can use it")
        if not stop.is_set():
            raise RestartError("an operator asked for a restart")

    async def _pull(self, tasks: asyncio.TaskGroup) -> None:
        parts = self._parts
        while True:
            running = sum(run.forwards for run in self._runs.values())
            if running >= parts.engine.max_batch_size:
                self._changed.clear()
                await self._changed.wait()
                continue
            await parts.blobs.healthy.wait()
            try:
                taken = await parts.queue.pull(parts.engine.model.name, _LANES, 1, _PULL_SECONDS)
            except errors.UnavailableError as error:
                log.warning("cannot pull, trying again", why=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            for delivery in taken:
                if parts.blobs.trouble:  # it came while the store went away
                    with suppress(errors.UnavailableError):
                        await delivery.nak()
                elif run := self._take(delivery):
                    self._tasks[run.job_id] = tasks.create_task(self._run(run))
                    await run.opened.wait()  # now `run.forwards` is known

    def _take(self, delivery: Delivery) -> JobExecution | None:
        """Counts the job in at once; None when it is here already and goes on."""
        job_id = delivery.job.job_id
        if earlier := self._runs.get(job_id):
            earlier.adopt(delivery)
            return None
        run = self._runs[job_id] = JobExecution(self._parts, delivery)
        JOBS_RUNNING.set(len(self._runs))
        return run

    async def _run(self, run: JobExecution) -> None:
        try:
            with structlog.contextvars.bound_contextvars(job=run.job_id):
                await run.run()
        finally:
            if run.job:
                self._leftovers.add(run.job)
            del self._runs[run.job_id]
            del self._tasks[run.job_id]
            JOBS_RUNNING.set(len(self._runs))
            self._changed.set()

    async def _drain(self, seconds: float) -> None:
        if self._runs:
            log.info("draining", jobs=len(self._runs), seconds=seconds)
        await self._emptied(seconds)
        for run in list(self._runs.values()):
            run.hand_back()
        await self._emptied(HAND_BACK_SECONDS)
        # An upload or a step that hangs: nobody waits for it, another worker does the job anew.
        for job_id, task in self._tasks.items():
            log.warning("job cut short", job=job_id)
            task.cancel()

    async def _emptied(self, seconds: float) -> None:
        """Waits until no job is left, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._runs:
                    self._changed.clear()
                    await self._changed.wait()

    async def _on_cancel(self, job_id: int) -> None:
        if run := self._runs.get(job_id):
            run.cancel()

    async def _on_command(self, order: WorkerCommand) -> None:
        log.info("told by the operator", order=order)
        match order:
            case WorkerCommand.RESTART:
                self._restarting.set()
            case WorkerCommand.CLEAR_CACHE:
                self._parts.engine.clear_cache()
                try:
                    await asyncio.to_thread(self._parts.forget_downloads)
                except OSError as error:
                    log.warning("downloads not deleted", why=str(error))

    async def _announce(self, announced: Callable[[], None] | None) -> None:
        parts = self._parts
        load = Utilization(parts.engine)
        with suppress(errors.UnavailableError):  # what workers before us have measured
            known = await self._registry.model(parts.engine.model.name)
            parts.pace.pixel_step_seconds = known.pixel_step_seconds if known else 0.0
        while True:
            parts.pace.device_worked(parts.engine.busy_seconds)
            pace = parts.pace.pixel_step_seconds
            info = WorkerInfo(
                name=parts.name,
                model=replace(parts.engine.model, pixel_step_seconds=pace),
                device=parts.engine.device,
                job_seconds=parts.pace.job_seconds,
                busy=load.measure(time.monotonic()),
            )
            with suppress(errors.UnavailableError):
                await self._registry.announce(info)
                if announced:
                    announced()
                announced = None
            await asyncio.sleep(ANNOUNCE_SECONDS)
