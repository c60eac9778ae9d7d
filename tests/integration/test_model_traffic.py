"""Two workers share three models, with room for one model on each, while the traffic shifts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from img2img.v1 import job_pb2
from img2img_server.nats.bus import connect_bus
from img2img_server.settings import Settings
from img2img_server.telemetry import MODEL_SWAPS
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from img2img_server.worker.lease import counted_attempts
from tests.catalogues import FakeLoader, catalogue_worker
from tests.stack import Api, running_api, settings, spec

MODELS = {"a": 4, "b": 4, "c": 4}
LIMIT = 200
SWAP_SECONDS = 0.4
LOAD_SECONDS = 0.1


def engine(name: str) -> FakeEngine:
    """Returns an engine that runs one job at a time, in 120 ms."""
    model = replace(FAKE_MODEL, name=name)
    return FakeEngine(model, step_seconds=0.03, max_batch_size=1, state_key=name)


def loader() -> FakeLoader:
    return FakeLoader(MODELS, budget=4, load_seconds=LOAD_SECONDS, make=engine)


async def flood(api: Api, model: str, number: int) -> list[job_pb2.Job]:
    """Creates jobs as fast as possible; returns them once they have succeeded."""
    jobs = [await api.create(spec(model=model, strength=1.0)) for _ in range(number)]
    return [await api.reaches(job.name, job_pb2.Job.STATE_SUCCEEDED) for job in jobs]


def start(job: job_pb2.Job) -> float:
    return job.start_time.ToMicroseconds() / 1e6


def loads_before(job: job_pb2.Job, loader: FakeLoader) -> list[str]:
    """Returns the other models that a worker loaded while the job waited."""
    created = job.create_time.ToMicroseconds() / 1e6
    loads = zip(loader.loads, loader.load_times, strict=True)
    return [name for name, at in loads if created < at < start(job) and name != job.spec.model]


async def test_no_job_is_lost_and_none_starves_while_traffic_shifts_between_models(
    engine_settings: Callable[..., Settings],
) -> None:
    first, second = loader(), loader()
    swapped = {name: MODEL_SWAPS.labels(name)._value.get() for name in MODELS}
    options = {"model_swap_seconds": SWAP_SECONDS, "queue_limit": LIMIT}
    async with (
        connect_bus(engine_settings(queue_limit=LIMIT)) as bus,
        catalogue_worker(bus, first, name="w1", **options),
        catalogue_worker(bus, second, name="w2", **options),
        running_api(bus, settings(queue_limit=LIMIT)) as api,
    ):
        began = time.monotonic()
        alone = await flood(api, "a", 6)
        # Both workers have more jobs of a and b than they can run, and then one job of c comes.
        flooding = [asyncio.create_task(flood(api, name, 18)) for name in "ab"]
        await asyncio.sleep(0.6)
        (rare,) = await flood(api, "c", 1)
        often = [await flooded for flooded in flooding]
        # The traffic shifts to c.
        late = await flood(api, "c", 6)
        seconds = time.monotonic() - began
        jobs = [*alone, rare, *often[0], *often[1], *late]
        stored = [await bus.jobs.get("dev", job.id) for job in jobs]
    assert len({job.name for job in jobs}) == 6 + 1 + 36 + 6
    # A job that is requeued when its model is unloaded begins again, which does not count.
    assert {counted_attempts(each.job) for each in stored if each} == {1}
    loads = [*first.loads, *second.loads]
    swaps = sum(MODEL_SWAPS.labels(name)._value.get() - swapped[name] for name in MODELS)
    assert swaps == len(loads) - 2  # Each worker begins with one model and has room for one.
    assert first.most_bytes == second.most_bytes == 4
    assert {"a", "b", "c"} <= set(loads)
    # Each of the two other models may run for the bound before c. A slow machine makes the turns
    # longer, but not more.
    before = [loads_before(rare, each) for each in (first, second)]
    assert all(len(names) <= 2 for names in before), before
    assert all(start(rare) < max(map(start, each)) for each in often)
    # A worker keeps a model with jobs for the bound, so it swaps no more often than this.
    assert len(loads) <= 2 + 2 * seconds / SWAP_SECONDS
