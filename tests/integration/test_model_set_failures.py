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
from img2img_server.domain.models import ModelState
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.queue import ModelCommand
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from img2img_server.testing.memory_queue import MemoryControl
from img2img_server.worker.model_loader import LoadedModel
from tests.catalogues import FakeLoader, announced, catalogue_worker
from tests.stack import Api, read_until, running_api, spec

SUCCEEDED = job_pb2.Job.STATE_SUCCEEDED
TWO = {"a": 4, "b": 4}


async def run(api: Api, model: str) -> job_pb2.Job:
    job = await api.create(spec(model=model, strength=1.0))
    return await api.reaches(job.name, SUCCEEDED)


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
    async with (
        catalogue_worker(bus, loader, model_swap_seconds=0.1),
        running_api(bus) as api,
    ):
        first = await api.create(spec(model="a", strength=1.0))
        await read_until(api.watch(first.name), "step")
        await run(api, "b")
        job = await api.reaches(first.name, SUCCEEDED)
        messages = await read_until(api.watch(first.name), "succeeded")
    starts = [m.event.started for m in messages if m.event.HasField("started")]
    assert [(it.attempt, list(it.done_steps)) for it in starts] == [(1, []), (1, [2])]
    assert job.attempt == 1


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
        await asyncio.wait_for(suspended.wait(), 10)
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
    monkeypatch.setattr("img2img_server.worker.model_set.RETRY_SECONDS", 0.01)
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
