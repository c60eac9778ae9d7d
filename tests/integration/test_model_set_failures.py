"""A worker with a catalogue keeps its jobs and models through long steps and outages."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from img2img.v1 import job_pb2
from img2img_server.domain.models import ModelInfo, ModelState
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.queue import ModelCommand
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from img2img_server.testing.memory_control import MemoryControl
from img2img_server.testing.memory_records import MemoryWorkerRegistry
from img2img_server.worker.model_loader import EngineLoader, FoundModel, LoadedModel
from tests.catalogues import FakeLoader, announced, catalogue_worker, run, run_over_a_swap
from tests.stack import read_until, running_api, settings, spec

TWO = {"a": 4, "b": 4}


class LongStep(FakeEngine):
    """An engine whose second step is so long that a suspend takes effect late.

    Attributes:
        seconds: The time until a suspend takes effect; None: never.
    """

    seconds: float | None = 0.5

    def __init__(self, name: str, suspended: asyncio.Event) -> None:
        hold = 2 if name == "a" and not suspended.is_set() else None
        super().__init__(replace(FAKE_MODEL, name=name), hold_after=hold, state_key=name)
        self._suspended_event, self._event_loop = suspended, asyncio.get_running_loop()

    def suspend(self, job_id: int) -> None:
        self._event_loop.call_soon_threadsafe(self._suspended_event.set)
        if self.seconds is not None:
            threading.Timer(self.seconds, super().suspend, [job_id]).start()


async def test_a_step_that_is_longer_than_the_hand_over_of_a_stop_keeps_its_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.worker.worker.HAND_BACK_SECONDS", 0.05)
    bus, suspended = memory_bus(), asyncio.Event()
    loader = FakeLoader(TWO, budget=4, make=lambda name: LongStep(name, suspended))
    starts = await run_over_a_swap(bus, loader, swap_seconds=0.1)
    assert starts == [(1, []), (1, [2])]


async def test_a_stop_ends_the_wait_for_the_step_of_a_model_that_is_unloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.worker.worker.HAND_BACK_SECONDS", 0.05)
    monkeypatch.setattr(LongStep, "seconds", None)
    bus, suspended = memory_bus(), asyncio.Event()
    loader = FakeLoader(TWO, budget=4, make=lambda name: LongStep(name, suspended))
    async with (
        catalogue_worker(bus, loader, model_swap_seconds=0.1) as worker,
        running_api(bus) as api,
    ):
        job = await api.create(spec(model="a", strength=1.0))
        await read_until(api.watch(job.name), "step")
        await bus.control.command_model(ModelCommand(worker="w1/a", loads=False))
        await asyncio.wait_for(suspended.wait(), 30)
        worker.stop.set()
        await api.reaches(job.name, job_pb2.Job.STATE_QUEUED)


class Away(MemoryControl):
    """A control that cannot be reached when the worker of the second model starts."""

    failures = 0

    @asynccontextmanager
    async def on_cancel(self, handler: Callable[[int], Awaitable[None]]) -> AsyncIterator[None]:
        if self.failures:
            self.failures -= 1
            raise UnavailableError("NATS is away")
        async with super().on_cancel(handler):
            yield


async def test_an_outage_of_nats_at_the_end_of_a_load_does_not_end_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("img2img_server.worker.model_workers.RETRY_SECONDS", 0.01)
    control = Away()
    bus, loader = replace(memory_bus(), control=control), FakeLoader(TWO)
    async with catalogue_worker(bus, loader) as worker, running_api(bus) as api:
        await announced(bus, "a", ModelState.LOADED)
        control.failures = 3
        await run(api, "b")
        await run(api, "a")
        assert not worker.task.done()
    assert control.failures == 0
    assert loader.loads == ["a", "b"]


@dataclass
class Half(FakeLoader):
    """Fails in the middle of the load of `b`, and notes whether its weights are still there when
    the memory is reclaimed."""

    held: list[bool] = field(default_factory=list)
    half: weakref.ref[FakeEngine] | None = None

    async def load(self, model: CatalogueModel) -> LoadedModel:
        if model.name != "b":
            return await super().load(model)
        engine = FakeEngine()
        self.half = weakref.ref(engine)
        engine.stop()
        raise RuntimeError("a part is missing")

    async def reclaim(self) -> None:
        gc.collect()
        self.held.append(self.half is not None and self.half() is not None)


async def test_the_memory_of_a_load_that_failed_is_reclaimed() -> None:
    bus, loader = memory_bus(), Half(TWO)
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        await api.create(spec(model="b"))
        await announced(bus, "b", ModelState.FAILED)
        await run(api, "a")
    assert loader.held == [False]


@dataclass
class Downloads(FakeLoader):
    """Finds the models of `absent` only once `arrived` is set."""

    absent: str = ""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def find(self, model: CatalogueModel) -> FoundModel:
        if model.name in self.absent:
            await self.arrived.wait()
        return await super().find(model)


@pytest.mark.parametrize("absent", ["a", "b", "ab"])
async def test_a_slow_download_delays_no_other_model(
    absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("img2img_server.worker.model_set.FIRST_SECONDS", 0.05)
    bus, loader = memory_bus(), Downloads({"a": 4, "b": 4, "c": 4}, absent=absent)
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        for name in absent:  # An operator's command waits for the download, and delays none.
            await bus.control.command_model(ModelCommand(worker=f"w1/{name}", loads=True))
        await run(api, "c")
        await bus.control.command_model(ModelCommand(worker="w1/c", loads=False))
        await announced(bus, "c", ModelState.COLD)
        await run(api, "c")
        assert not set(absent) & set(loader.loads)
        loader.arrived.set()
        for name in absent:
            await announced(bus, name, ModelState.LOADED)
        await run(api, absent[0])


async def test_the_first_model_of_the_catalogue_is_loaded_first_if_it_is_found_soon() -> None:
    bus, loader = memory_bus(), Downloads(TWO, absent="a")
    asyncio.get_running_loop().call_later(0.1, loader.arrived.set)
    async with catalogue_worker(bus, loader):
        assert loader.loads == ["a"]


class Broken(MemoryWorkerRegistry):
    """A registry that has no valid record of the first model."""

    async def model(self, name: str) -> ModelInfo | None:
        if name == "a":
            raise ValueError("not a record")
        return await super().model(name)


async def test_an_unexpected_error_about_one_model_hides_no_other_one() -> None:
    bus, loader = replace(memory_bus(), workers=Broken()), FakeLoader(TWO)
    async with catalogue_worker(bus, loader):
        await announced(bus, "b", ModelState.LOADED)
        failure = (await announced(bus, "a", ModelState.FAILED)).failure
    assert failure.startswith("m.toml: entry a: source: cannot load ")
    assert failure.endswith("ValueError: not a record")


@dataclass
class Tight(FakeLoader):
    """A device whose free memory is low after each load, and too low if `full`."""

    full: bool = False

    def has_room(self, size: int, freed: int, used: int) -> bool:
        return size > 0 or used <= 4

    def is_full(self, used: int) -> bool:
        return self.full and used > 4


@pytest.mark.parametrize("full", [False, True])
async def test_a_model_with_jobs_is_unloaded_after_a_load_only_below_the_least_memory(
    full: bool,
) -> None:
    bus, loader = memory_bus(), Tight(TWO, full=full)
    async with catalogue_worker(bus, loader, model_swap_seconds=0.1), running_api(bus) as api:
        job = await api.create(spec(model="a", prompt="hold: it", strength=1.0))
        await read_until(api.watch(job.name), "step")
        await run(api, "b")
        # The model is loaded again soon afterwards, because it has a job.
        async with asyncio.timeout(30):
            while full and not loader.unloads:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert loader.unloads[:1] == (["a"] if full else [])
        if not full:
            assert (await api.get(job.name)).attempt == 1


async def test_an_idle_model_is_unloaded_if_a_new_one_leaves_too_little_memory() -> None:
    bus, loader = memory_bus(), Tight(TWO)
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        await run(api, "a")
        await asyncio.sleep(0.1)  # A model is idle 0.05 seconds after its last job.
        await run(api, "b")
        assert loader.loaded == {"b"}


async def test_memory_is_measured_between_the_steps_of_the_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = EngineLoader(settings(device="cpu", safety_checker="opennsfw"))
    free = 1
    monkeypatch.setattr(loader, "_memory", lambda: (free, 10))
    began, end = threading.Event(), threading.Event()

    def step() -> None:
        nonlocal free
        with loader._turns.turn():
            began.set()
            end.wait(10)
            free = 9

    thread = threading.Thread(target=step)
    thread.start()
    began.wait(10)
    measuring = asyncio.create_task(loader.measure())
    await asyncio.sleep(0.05)  # A measurement within the step would be over.
    end.set()
    await measuring
    thread.join(10)
    free = 1  # A later step runs.
    assert loader.has_room(2, 0, 0)
    assert not loader.is_full(0)
