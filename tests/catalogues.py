"""Workers with a catalogue of fake models, for tests of loading and unloading."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from img2img.v1 import job_pb2
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.engine.family import ModelError
from img2img_server.lifecycle import RestartError
from img2img_server.nats.bus import Bus
from img2img_server.setting_names import Origin
from img2img_server.settings import Settings
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine, FixedSafetyChecker
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.worker.model_loader import FoundModel, LoadedModel, NoRoomError
from img2img_server.worker.server import work_catalogue
from tests.stack import Api, read_until, running_api, settings, spec

FIELDS = {"model": "source"}

MakeEngine = Callable[[str], FakeEngine]


@dataclass
class FakeLoader:
    """Loads fake engines within a budget of bytes.

    Attributes:
        sizes: The bytes of each model.
        budget: The most bytes of loaded models; 0: no limit.
        load_seconds: The length of a load.
        wrong: Why a model cannot be loaded, by name.
        device_bytes: The bytes at which a load fails for lack of memory; 0: never.
        loads: The models that were loaded, in order.
        load_times: When each of them was loaded, in seconds since 1970.
        unloads: The models that were unloaded, in order.
        most_bytes: The most bytes that were loaded at a time.
    """

    sizes: Mapping[str, int]
    budget: int = 0
    load_seconds: float = 0.0
    make: MakeEngine = lambda name: FakeEngine(replace(FAKE_MODEL, name=name), state_key=name)
    wrong: dict[str, str] = field(default_factory=dict)
    device_bytes: int = 0
    loads: list[str] = field(default_factory=list)
    load_times: list[float] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    most_bytes: int = 0
    engines: dict[str, weakref.ref[FakeEngine]] = field(default_factory=dict)

    @property
    def bytes_now(self) -> int:
        return sum(self.sizes[name] for name in self.loaded)

    @property
    def loaded(self) -> set[str]:
        """The models whose engines still exist."""
        return {name for name, engine in self.engines.items() if engine() is not None}

    def release(self) -> None:
        """Lets held jobs of the loaded engines continue."""
        for engine in self.engines.values():
            if found := engine():
                found.release()

    async def find(self, model: CatalogueModel) -> FoundModel:
        return FoundModel(replace(FAKE_MODEL, name=model.name), self.sizes[model.name])

    async def loras(self, model: CatalogueModel) -> tuple[str, ...]:
        return ()

    async def load(self, model: CatalogueModel) -> LoadedModel:
        await asyncio.sleep(self.load_seconds)
        if why := self.wrong.get(model.name):
            raise ModelError(why)
        size = self.sizes[model.name]
        if self.device_bytes and self.bytes_now + size > self.device_bytes:
            raise NoRoomError("CUDA out of memory")
        engine = self.make(model.name)
        self.engines[model.name] = weakref.ref(engine)
        self.loads.append(model.name)
        self.load_times.append(time.time())
        self.most_bytes = max(self.most_bytes, self.bytes_now)
        return LoadedModel(engine, FixedSafetyChecker(0.0), size)

    async def unload(self, model: LoadedModel, seconds: float = 0.0) -> None:
        assert isinstance(model.engine, FakeEngine)
        self.unloads += [name for name, it in self.engines.items() if it() is model.engine]
        model.engine.release()
        await asyncio.to_thread(model.engine.stop)

    async def reclaim(self) -> None:
        gc.collect()

    async def measure(self) -> None:
        """Does nothing: the bytes are always known."""

    def is_full(self, used: int) -> bool:
        return bool(self.budget) and used > self.budget

    def has_room(self, size: int, freed: int, used: int) -> bool:
        return not self.budget or used - freed + size <= self.budget


@dataclass
class CatalogueWorker:
    """A worker with a catalogue. `stop` drains it."""

    loader: FakeLoader
    stop: asyncio.Event
    task: asyncio.Task[None]


def catalogue(*names: str, config: Settings | None = None) -> tuple[CatalogueModel, ...]:
    """Returns the models of a catalogue."""
    config = config or settings()
    return tuple(
        CatalogueModel(name, config.of_entry(Origin(f"m.toml: entry {name}", FIELDS), {}))
        for name in names
    )


@asynccontextmanager
async def catalogue_worker(
    bus: Bus,
    loader: FakeLoader,
    *,
    name: str = "w1",
    models: tuple[str, ...] = (),
    **changes: Any,
) -> AsyncIterator[CatalogueWorker]:
    """Yields a worker whose first model is loaded. `changes`: of the settings."""
    config = settings(**{"model_swap_seconds": 0.3, **changes})
    stop, ready = asyncio.Event(), asyncio.Event()
    blobs = MemoryBlobStore()
    await blobs.prepare()
    listed = catalogue(*(models or tuple(loader.sizes)), config=config)
    working = work_catalogue(
        *(config, name, bus, blobs, listed, loader, stop, ready.set),
        look_seconds=0.02,
        idle_seconds=0.05,
    )
    task = asyncio.create_task(working)
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield CatalogueWorker(loader, stop, task)
    finally:
        waiting.cancel()
        loader.release()
        stop.set()
        with suppress(RestartError):  # The worker is not restarted.
            await task


async def run(api: Api, model: str) -> job_pb2.Job:
    """Runs a job of the model to its end."""
    job = await api.create(spec(model=model, strength=1.0))
    return await api.reaches(job.name, job_pb2.Job.STATE_SUCCEEDED)


async def run_over_a_swap(
    bus: Bus, loader: FakeLoader, *, swap_seconds: float
) -> list[tuple[int, list[int]]]:
    """Runs a job of the model `a`, which is unloaded for a job of `b` in between.

    Returns:
        The attempt and the done steps of each start of the first job.
    """
    async with (
        catalogue_worker(bus, loader, model_swap_seconds=swap_seconds),
        running_api(bus) as api,
    ):
        job = await api.create(spec(model="a", strength=1.0))
        await read_until(api.watch(job.name), "step")
        await run(api, "b")
        assert (await api.reaches(job.name, job_pb2.Job.STATE_SUCCEEDED)).attempt == 1
        messages = await read_until(api.watch(job.name), "succeeded")
    starts = [each.event.started for each in messages if each.event.HasField("started")]
    return [(start.attempt, list(start.done_steps)) for start in starts]


async def announced(bus: Bus, model: str, state: ModelState, worker: str = "w1") -> WorkerInfo:
    """Waits until a worker announces a model in that state."""
    async with asyncio.timeout(30):
        while True:
            for each in await bus.workers.announced():
                if (each.name, each.model_state) == (f"{worker}/{model}", state):
                    return each
            await asyncio.sleep(0.005)
