"""Pulls the jobs that its dispatcher allows, runs them, and requeues them when it stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import structlog

from img2img_server import errors
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.domain.params import Lane
from img2img_server.interfaces.queue import Control, Delivery, UsageReport, WorkerCommand
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.lifecycle import RestartError, first_of
from img2img_server.tasks import background_task
from img2img_server.worker.deps import WorkerDeps
from img2img_server.worker.execution import JobExecution
from img2img_server.worker.handover import HandOver
from img2img_server.worker.orphan_cleanup import OrphanCleanup

ANNOUNCE_SECONDS = 5.0
HAND_BACK_CHECK_SECONDS = 5.0
USAGE_SECONDS = 0.5  # seconds between two reports of device time by tenant
CHECK_SECONDS = 0.02
PULL_END_SECONDS = 2.0
WITHDRAW_SECONDS = 3.0
HAND_BACK_SECONDS = 5.0  # seconds for running steps and uploads after the drain time
UNLOAD_HAND_BACK_SECONDS = (
    120.0  # the same if the process continues, and so may wait for long steps
)
CLEANUP_SECONDS = 2.0  # seconds for deleting the files of unsuccessful jobs
_PULL_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_LANES = (Lane.REALTIME, Lane.BATCH)

log = structlog.get_logger()


class Worker:
    """Runs jobs of the queue on one engine. It pulls what can run now, and one job ahead."""

    def __init__(
        self, deps: WorkerDeps, control: Control, registry: WorkerRegistry, *, drain_seconds: float
    ) -> None:
        self._deps = deps
        self._control = control
        self._registry = registry
        self._drain_seconds = drain_seconds
        self._runs: dict[int, JobExecution] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._cleanup = OrphanCleanup(deps.jobs, deps.blobs)
        self._changed = asyncio.Event()
        self._restarting = asyncio.Event()
        self._unloading = asyncio.Event()
        self._used_at = time.monotonic()

    @property
    def used_at(self) -> float:
        """Monotonic time when a job last needed the model."""
        return time.monotonic() if self._runs else self._used_at

    @property
    def is_unloading(self) -> bool:
        """Returns whether `unload` was called."""
        return self._unloading.is_set()

    @property
    def has_lost_device(self) -> bool:
        """Returns whether only a new process can use the device."""
        return self._deps.device_lost.is_set()

    def unload(self, drain_seconds: float) -> None:
        """Ends `run` as `stop` does, but its process may load the model again: it stays
        announced, as not loaded.
        """
        self._drain_seconds = min(drain_seconds, self._drain_seconds)
        self._unloading.set()

    async def run(self, stop: asyncio.Event, announced: Callable[[], None] | None = None) -> None:
        """Works until `stop` is set, then finishes or requeues its jobs.

        Args:
            announced: called once, when the worker is announced and takes jobs.

        Raises:
            RestartError: an operator requested a restart, and the jobs are requeued.
            UnavailableError: the device is lost; other workers have the jobs.
        """
        async with (
            self._control.on_cancel(self._on_cancel),
            self._control.on_command(self._on_command),
            self._control.on_usage(self._on_usage),
            asyncio.TaskGroup() as tasks,
        ):
            cleaning = tasks.create_task(self._cleanup.run())
            handing_back = tasks.create_task(self._hand_back_without_store())
            announcing = tasks.create_task(self._announce(announced))
            pulling = tasks.create_task(self._pull(tasks))
            checking = tasks.create_task(self._check_waiting())
            sharing = tasks.create_task(self._share_usage())
            lost = self._deps.device_lost
            await first_of(
                stop.wait(), self._restarting.wait(), self._unloading.wait(), lost.wait()
            )
            # Order: stop announcing, stop pulling, end or requeue the jobs, delete orphan files.
            announcing.cancel()
            pulling.cancel()
            handing_back.cancel()
            await asyncio.wait({pulling}, timeout=PULL_END_SECONDS)
            await self._withdraw(draining=bool(self._runs))
            may_drain = (stop.is_set() or self._unloading.is_set()) and not lost.is_set()
            async with background_task(self._announce_draining()):
                await self._drain(self._drain_seconds if may_drain else 0.0, stop)
            await self._withdraw()
            await self._cleanup.finish(CLEANUP_SECONDS)
            for task in (cleaning, checking, sharing):
                task.cancel()
        if lost.is_set():
            raise errors.UnavailableError("the device is lost; only a new process can use it")
        if self._restarting.is_set() and not stop.is_set():
            raise RestartError("an operator requested a restart")

    async def _pull(self, tasks: asyncio.TaskGroup) -> None:
        deps, dispatcher = self._deps, self._deps.dispatcher
        while True:
            dispatcher.changed.clear()
            if not dispatcher.may_pull:
                await dispatcher.changed.wait()
                continue
            await deps.blobs.until_takes_work()
            try:
                taken = await deps.queue.pull(
                    deps.engine.model.name,
                    _LANES,
                    dispatcher.most,
                    _PULL_SECONDS,
                    order=dispatcher,
                    is_idle=dispatcher.is_idle,
                    interrupt=dispatcher.changed,
                )
            except errors.UnavailableError as error:
                log.warning("pull_failed", why=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            runs: list[JobExecution] = []
            for delivery in taken:
                # The job may arrive while the store becomes unavailable.
                if not deps.blobs.takes_work:
                    with suppress(errors.UnavailableError):
                        await delivery.nak()
                elif run := self._take(delivery):
                    self._tasks[run.job_id] = tasks.create_task(self._run(run))
                    runs.append(run)
            for run in runs:
                await run.opened.wait()  # The dispatcher has the job from here on.

    async def _share_usage(self) -> None:
        """Reports the device time of tenants to the other workers."""
        while True:
            await asyncio.sleep(USAGE_SECONDS)
            if report := self._deps.usage.take_report():
                with suppress(errors.UnavailableError):
                    await self._control.report_usage(report)

    async def _on_usage(self, report: UsageReport) -> None:
        self._deps.usage.receive(report)

    async def _check_waiting(self) -> None:
        """Lets waiting jobs begin also when no event of the engine announces their turn."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if self._deps.dispatcher.waiting:
                self._deps.dispatcher.check()

    def _take(self, delivery: Delivery) -> JobExecution | None:
        """Adds the job to the runs. Returns None if it already runs here and continues."""
        job_id = delivery.job.job_id
        if earlier := self._runs.get(job_id):
            earlier.adopt(delivery)
            return None
        run = self._runs[job_id] = JobExecution(self._deps, delivery)
        return run

    async def _run(self, run: JobExecution) -> None:
        try:
            with structlog.contextvars.bound_contextvars(job=run.job_id):
                await run.run()
        finally:
            if run.job:
                self._cleanup.add(run.job)
            del self._runs[run.job_id]
            del self._tasks[run.job_id]
            self._used_at = time.monotonic()
            self._changed.set()

    async def _drain(self, seconds: float, stop: asyncio.Event) -> None:
        for run in list(self._runs.values()):
            run.hand_back_waiting()
        if self._runs:
            log.info("worker_drains", jobs=len(self._runs), seconds=seconds)
        moving = HandOver(self._deps, self._registry, self._info())
        async with background_task(moving.run(self._runs.values())):
            await self._emptied(seconds)
        for run in list(self._runs.values()):
            run.hand_back()
        if self._unloading.is_set():
            # A job that is cancelled within a long step would lose its state and an attempt.
            await first_of(
                self._emptied(UNLOAD_HAND_BACK_SECONDS),
                stop.wait(),
                self._restarting.wait(),
                self._deps.device_lost.wait(),
            )
        await self._emptied(HAND_BACK_SECONDS)
        # The upload or step hangs, so another worker runs the job again.
        for job_id, task in self._tasks.items():
            log.warning("job_cancelled_at_shutdown", job=job_id)
            task.cancel()

    async def _emptied(self, seconds: float) -> None:
        """Waits until no job runs or the time has expired."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._runs:
                    self._changed.clear()
                    await self._changed.wait()

    async def _hand_back_without_store(self) -> None:
        """Requeues all jobs while the store is away from this worker, but not from another one."""
        deps = self._deps
        while True:
            await deps.blobs.changed(HAND_BACK_CHECK_SECONDS)
            if not (deps.blobs.is_away and self._runs and await self._others_can_store()):
                continue
            log.warning("jobs_handed_back_without_store", jobs=len(self._runs))
            for run in list(self._runs.values()):
                run.hand_back("the worker cannot store files")

    async def _others_can_store(self) -> bool:
        """Returns whether another live worker of the model can store files."""
        with suppress(errors.UnavailableError):
            return any(
                worker.model.name == self._deps.engine.model.name and not worker.store_trouble
                for worker in await self._registry.workers()
                if worker.name != self._deps.name
            )
        return False

    async def _on_cancel(self, job_id: int) -> None:
        if run := self._runs.get(job_id):
            run.cancel()

    async def _on_command(self, command: WorkerCommand) -> None:
        log.info("worker_command_received", command=command)
        match command:
            case WorkerCommand.RESTART:
                self._restarting.set()
            case WorkerCommand.CLEAR_CACHE:
                self._deps.engine.clear_cache()
                try:
                    await asyncio.to_thread(self._deps.forget_downloads)
                except OSError as error:
                    log.warning("downloads_not_deleted", why=str(error))

    async def _withdraw(self, *, draining: bool = False) -> None:
        """Withdraws the announcement, which expires by itself, or changes it to draining. If the
        model is unloaded, changes it to that.
        """
        with suppress(errors.UnavailableError, TimeoutError):
            async with asyncio.timeout(WITHDRAW_SECONDS):
                if self._unloading.is_set():
                    cold = replace(self._info(), model_state=ModelState.COLD, state_key="")
                    await self._registry.announce(cold)
                elif draining:
                    await self._registry.announce(replace(self._info(), draining=True))
                else:
                    await self._registry.withdraw(self._deps.name)

    async def _announce_draining(self) -> None:
        """Keeps the announcement alive, so that the worker's jobs do not look like lost ones."""
        while True:
            await asyncio.sleep(ANNOUNCE_SECONDS)
            await self._withdraw(draining=True)

    def _info(self) -> WorkerInfo:
        deps, throughput = self._deps, self._deps.throughput
        return WorkerInfo(
            name=deps.name,
            model=replace(deps.engine.model, pixel_step_seconds=throughput.pixel_step_seconds),
            device=deps.engine.device,
            job_seconds=throughput.job_seconds,
            forward_seconds=throughput.forward_seconds,
            job_forward_seconds=throughput.job_forward_seconds,
            busy=throughput.busy,
            held_jobs=deps.dispatcher.waiting,
            store_trouble=deps.blobs.trouble,
            begun_jobs=deps.dispatcher.begun,
            state_key=deps.engine.state_key,
            has_catalogue=deps.rank is not None,
            rank=deps.rank or 0,
        )

    async def _announce(self, announced: Callable[[], None] | None) -> None:
        deps = self._deps
        throughput = deps.throughput
        with suppress(errors.UnavailableError):
            # The throughput starts with the measurement of earlier workers.
            known = await self._registry.model(deps.engine.model.name)
            throughput.pixel_step_seconds = known.pixel_step_seconds if known else 0.0
        while True:
            throughput.add_busy_seconds(deps.engine.busy_seconds, time.monotonic())
            with suppress(errors.UnavailableError):
                await self._registry.announce(self._info())
                if announced:
                    announced()
                announced = None
            await deps.probe()
            await deps.blobs.changed(ANNOUNCE_SECONDS)
