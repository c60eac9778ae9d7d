"""Explores interleavings of calls that create the job of one request_id.

A race has calls at several apis, a worker, and a search for leftover permits. Every operation on
NATS waits for its turn before it has its effect and again before it returns. A seeded random
generator draws the turns and the faults. So a race is repeated with its seed.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from img2img.v1 import job_pb2
from img2img_server.api.admission import Admitted
from img2img_server.api.intake import Intake
from img2img_server.api.quota import Quota
from img2img_server.domain.events import Started, Succeeded
from img2img_server.domain.job import Job, State, advance
from img2img_server.domain.params import JobParams, Lane
from img2img_server.errors import QueueFullError, ServiceError, UnavailableError
from img2img_server.imaging.base import CheckedImage
from img2img_server.interfaces.queue import Delivery, OwnershipLostError
from img2img_server.interfaces.records import ConflictError, Stored
from img2img_server.nats.bus import Bus
from img2img_server.settings import Settings

MODEL, TENANT, LIMIT = "m", "acme", 3
SETTINGS = Settings()
FAULTS = ("fails", "loses its reply", "has its effect later", "dies before", "dies after")
_SETTLING = 5  # passes of the event loop until the tasks that were woken wait again
_REPEATS = 20  # more than a caller needs once the faults are over

Report = tuple[str, int | str]  # what a call was answered: a job id, or the name of an error


class Died(BaseException):
    """The process of the call was killed, so none of its code runs any more."""


class Turns:
    """Lets one operation at a time continue."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: list[asyncio.Future[None]] = []
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.append(task)
        return task

    async def wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    async def effect(self, work: Coroutine[Any, Any, Any]) -> Any:
        self._busy += 1
        self._idle.clear()
        try:
            return await work
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def run(self) -> None:
        """Returns when all tasks are done."""
        while not all(task.done() for task in self.tasks):
            for _ in range(_SETTLING):
                await asyncio.sleep(0)
            await self._idle.wait()
            waiting = [turn for turn in self._waiting if not turn.done()]
            if waiting:
                waiting.pop(self._rng.randrange(len(waiting))).set_result(None)
            self._waiting = waiting
        done, self.tasks = self.tasks, []
        for task in done:
            if not isinstance(task.exception(), ServiceError | None):
                task.result()


class Process:
    """One api. Its operations on NATS take turns and fail at random."""

    def __init__(self, bus: Bus, turns: Turns, rng: random.Random, faults: float) -> None:
        self._turns = turns
        self._rng = rng
        self._faults = faults
        self._is_dead = False
        parts = ("queue", "permits", "events", "jobs")
        self.bus: Any = SimpleNamespace(
            **{part: Wrapped(getattr(bus, part), self) for part in parts},
            storage=SimpleNamespace(current=self._nothing),
        )

    async def _nothing(self, *_: object) -> None:
        await self._turn()

    async def _turn(self) -> None:
        await self._turns.wait()
        if self._is_dead:
            raise Died

    async def operate(self, operation: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        await self._turn()
        fault = self._rng.choice(FAULTS) if self._rng.random() < self._faults else ""
        if fault == "dies before":
            self._is_dead = True
            raise Died
        if fault == "has its effect later":
            self._turns.start(self._later(operation))
        if fault in ("fails", "has its effect later"):
            raise UnavailableError
        found = await self._turns.effect(operation())
        if fault == "dies after":
            self._is_dead = True
        await self._turn()
        if fault == "loses its reply":
            raise UnavailableError
        return found

    async def _later(self, operation: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        for _ in range(self._rng.randrange(1, 12)):
            await self._turns.wait()
        with suppress(ConflictError, OwnershipLostError, ServiceError):
            await self._turns.effect(operation())

    def intake(self) -> Intake:
        quota = Quota(self.bus, limit=LIMIT, abandon_seconds=0.0)
        deps: Any = SimpleNamespace(settings=SETTINGS, jobs=self.bus.jobs, bus=self.bus)
        backlog: Any = SimpleNamespace(note=lambda *_: None)
        admission: Any = SimpleNamespace(admit=self._admit)
        return Intake(deps, admission, backlog, quota)

    async def _admit(self, *_: object) -> Admitted:
        for _ in range(self._rng.randrange(4)):  # The download of the init image.
            await self._turn()
        params = JobParams(prompt="p", model=MODEL)
        image = CheckedImage(data=b"image", prepared=True, width=64, height=64, own_size=(64, 64))
        return Admitted(
            params=params,
            original_prompt="",
            warning="",
            pixel_steps=1,
            size=0,
            image=image,
            fetch_seconds=0.0,
            position=0,
            eta_seconds=None,
        )


class Wrapped:
    """A part of a Bus, or a writer of an event log, whose methods are operations."""

    def __init__(self, part: Any, process: Process) -> None:
        self._part = part
        self._process = process

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if not callable(found):
            return found

        async def method(*args: Any, **kwargs: Any) -> Any:
            result = await self._process.operate(lambda: found(*args, **kwargs))
            return Wrapped(result, self._process) if name == "open" else result

        return method


class Race:
    """One race. `buses`: a connection for each api, and the last one for the worker and checks.
    `pull_seconds`: how long the worker waits for a job.
    """

    def __init__(self, buses: Sequence[Bus], seed: int, pull_seconds: float) -> None:
        self._pull_seconds = pull_seconds
        self._rng = random.Random(seed)
        self._buses = buses
        self._turns = Turns(self._rng)
        self._request_id = str(uuid.UUID(int=self._rng.getrandbits(128)))
        self._caller: Any = SimpleNamespace(
            principal=SimpleNamespace(tenant=TENANT),
            link_base="",
            remaining_seconds=None,
            fingerprint="",
        )
        self.runs: list[int] = []  # ids of the jobs that were run
        self.reports: list[Report] = []

    async def run(self) -> None:
        """Runs the race. Raises AssertionError if it breaks a promise."""
        faults = self._rng.choice((0.0, 0.03, 0.1, 0.25))
        for _ in range(self._rng.randrange(2, 5)):
            self._turns.start(self._call(self._process(faults), self._request_id))
        if self._rng.random() < 0.5:  # Another job of the tenant competes for the limit.
            self._turns.start(self._call(self._process(faults), ""))
        if self._rng.random() < 0.5:
            self._turns.start(self._search())
        for _ in range(self._rng.randrange(3)):
            self._turns.start(self._work())
        await self._turns.run()
        await self._check_limit()
        # All faults are over. Every caller with an error repeats its call.
        repeated = await self._repeated()
        answers = {answer for request, answer in self.reports if request and answer != "error"}
        assert answers <= {repeated}, f"one request_id gave {answers | {repeated}}"
        await self._drain()
        accepted = {answer for _, answer in self.reports if answer != "error"}
        ran = set(self.runs)
        assert accepted | {repeated} <= ran, f"accepted {accepted}, of these only {ran} ran"
        assert len(self.runs) == len(ran), f"a job ran twice: {self.runs}"
        await self._check_leftovers(repeated)

    def _process(self, faults: float) -> Process:
        bus = self._buses[self._rng.randrange(len(self._buses) - 1)]
        return Process(bus, self._turns, self._rng, faults)

    @property
    def _bus(self) -> Bus:
        return self._buses[-1]

    async def _call(self, process: Process, request_id: str) -> None:
        answer: int | str = "error"
        with suppress(Died, UnavailableError, QueueFullError):
            stored = await process.intake().create(job_pb2.JobSpec(), request_id, self._caller)
            assert stored.job.is_accepted
            answer = stored.job.id
        self.reports.append((request_id, answer))

    async def _search(self) -> None:
        quota = Quota(self._process(0.0).bus, limit=0, abandon_seconds=0.0)
        with suppress(UnavailableError):
            await quota.unfinished(TENANT)

    async def _work(self) -> None:
        """Runs some of the jobs that come while the race lasts."""
        for _ in range(self._rng.randrange(1, 6)):
            await self._turns.wait()
            for delivery in await self._turns.effect(self._pull(1)):
                taken = await self._turns.effect(self._take(delivery))
                for _ in range(self._rng.randrange(6)):
                    await self._turns.wait()
                await self._turns.effect(self._finish(delivery, taken))

    async def _pull(self, most: int) -> list[Delivery]:
        return await self._bus.queue.pull(MODEL, list(Lane), most, self._pull_seconds)

    async def _take(self, delivery: Delivery) -> Stored | None:
        """Starts the job as a worker does. Returns None if there is nothing to run."""
        stored = await self._bus.jobs.get(TENANT, delivery.job.job_id)
        if stored is None or stored.job.state.is_terminal or not delivery.job.is_of(stored.job):
            return None
        started = Started(worker="w", model=MODEL, attempt=stored.job.attempt + 1)
        job = advance(stored.job, started, 1.0)
        revision = await self._bus.jobs.update(job, stored.revision)
        self.runs.append(job.id)
        return Stored(job, revision)

    async def _finish(self, delivery: Delivery, taken: Stored | None) -> None:
        if taken:
            await self._bus.jobs.update(advance(taken.job, Succeeded(), 2.0), taken.revision)
        await delivery.ack()

    async def _repeated(self) -> int:
        intake = Process(self._bus, self._turns, self._rng, 0.0)
        for _ in range(_REPEATS):
            call = self._turns.start(
                intake.intake().create(job_pb2.JobSpec(), self._request_id, self._caller)
            )
            await self._turns.run()
            error = call.exception()
            if error is None:
                return int(call.result().job.id)
            assert isinstance(error, UnavailableError | QueueFullError), error
            if isinstance(error, QueueFullError):
                await self._drain()
        raise AssertionError(f"the request_id cannot be used any more: {error}")

    async def _drain(self) -> None:
        while deliveries := await self._pull(10):
            taken = [await self._take(delivery) for delivery in deliveries]
            for delivery, run in zip(deliveries, taken, strict=True):
                await self._finish(delivery, run)

    async def _records(self) -> list[Job]:
        ids = await self._bus.jobs.list_ids(TENANT)
        found = [(await self._bus.jobs.latest(TENANT, job_id))[0] for job_id in ids]
        return [job for job in found if job is not None]

    async def _check_limit(self) -> None:
        unfinished = [
            job for job in await self._records() if job.is_accepted and not job.state.is_terminal
        ]
        assert len(unfinished) <= LIMIT, f"{len(unfinished)} unfinished jobs"
        permits = {permit for permit, _ in await self._bus.permits.oldest(TENANT, 100)}
        assert {job.permit for job in unfinished} <= permits, "a job has lost its permit"

    async def _check_leftovers(self, job_id: int) -> None:
        """Checks that no record waits for ever and that every permit is given back."""
        quota = Quota(self._bus, limit=0, abandon_seconds=0.0)
        await quota.unfinished(TENANT)
        assert await self._bus.permits.count(TENANT) == 0
        records = await self._records()
        assert all(job.state is State.SUCCEEDED for job in records), records
        assert job_id in [job.id for job in records]


async def race(buses: Sequence[Bus], seed: int, *, pull_seconds: float = 0.0) -> Race:
    """Runs the race of that seed. Raises AssertionError with the seed."""
    running = Race(buses, seed, pull_seconds)
    try:
        async with asyncio.timeout(60):
            await running.run()
    except (Exception, AssertionError) as error:
        raise AssertionError(f"race {seed}: {error!r}; reports {running.reports}") from error
    return running
