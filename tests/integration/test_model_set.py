"""A worker with a catalogue loads the models that have jobs, and unloads others for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, job_pb2, service_pb2
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.domain.params import Lane
from img2img_server.errors import OperatorError, UnavailableError
from img2img_server.interfaces.queue import ModelCommand, WorkerCommand
from img2img_server.lifecycle import RestartError
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.settings import Settings
from img2img_server.telemetry import MODEL_LOADED, MODEL_SWAPS
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.catalogues import FakeLoader, announced, catalogue_worker, run, run_over_a_swap
from tests.stack import (
    Api,
    read_until,
    refusal,
    running_api,
    running_worker,
    settings,
    spec,
)

SUCCEEDED = job_pb2.Job.STATE_SUCCEEDED
THREE = {"a": 4, "b": 4, "c": 4}


async def test_models_that_fit_stay_loaded() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE)
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        jobs = [await run(api, model) for model in "abcabc"]
        assert loader.loaded == {"a", "b", "c"}
    assert loader.loads == ["a", "b", "c"]
    assert [job.worker for job in jobs[:3]] == ["w1/a", "w1/b", "w1/c"]


async def test_all_models_are_announced_and_only_the_first_one_is_loaded() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE)
    async with catalogue_worker(bus, loader):
        for model in "bc":
            await announced(bus, model, ModelState.COLD)
        await announced(bus, "a", ModelState.LOADED)
        assert {model.name for model in await bus.workers.models()} == {"a", "b", "c"}
    assert loader.loads == ["a"]
    assert await bus.workers.announced() == []


async def test_the_least_recently_used_model_is_unloaded_and_its_memory_returned() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE, budget=8)
    swaps = MODEL_SWAPS.labels("c")._value.get()
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        for model in "aba":
            await run(api, model)
        await run(api, "c")
        assert loader.loaded == {"a", "c"}
        assert [MODEL_LOADED.labels(name)._value.get() for name in "abc"] == [1, 0, 1]
        await announced(bus, "b", ModelState.COLD)
        await run(api, "b")
    assert loader.loads == ["a", "b", "c", "b"]
    assert loader.most_bytes == 8
    assert MODEL_SWAPS.labels("c")._value.get() == swaps + 1


async def test_a_model_with_jobs_is_preferred_only_for_the_stated_time() -> None:
    bus, engines = memory_bus(queue_limit=100), list[FakeEngine]()

    def slow(name: str) -> FakeEngine:
        """Returns an engine that runs one job at a time, in at least a tenth of a second. The first
        engine waits in its first job.
        """
        model, hold = replace(FAKE_MODEL, name=name), None if engines else 1
        options = {"step_seconds": 0.025, "max_batch_size": 1, "state_key": name}
        engines.append(FakeEngine(model, hold_after=hold, **options))
        return engines[-1]

    loader = FakeLoader(THREE, budget=4, make=slow)
    config = settings(queue_limit=100)
    async with (
        catalogue_worker(bus, loader, model_swap_seconds=0.5),
        running_api(bus, config) as api,
    ):
        # The others wait behind the first job until all are created.
        many = [await api.create(spec(model="a", strength=1.0)) for _ in range(20)]
        await read_until(api.watch(many[0].name), "step")
        created = await api.create(spec(model="b", strength=1.0))
        loader.release()
        other = await api.reaches(created.name, SUCCEEDED)
        many = [await api.reaches(job.name, SUCCEEDED) for job in many]
    assert max(job.attempt for job in many) <= 2
    start = other.start_time.ToMicroseconds()
    assert start - created.create_time.ToMicroseconds() >= 500_000
    # Each job takes at least a tenth of a second on any machine, so five end within that time and
    # some more until the worker looks and the model is unloaded.
    assert sum(job.end_time.ToMicroseconds() < start for job in many) <= 15
    assert loader.loads[:3] == ["a", "b", "a"]


async def test_a_running_job_that_outlasts_its_model_continues_after_the_next_load() -> None:
    bus = memory_bus()
    models: list[FakeEngine] = []

    def held(name: str) -> FakeEngine:
        hold = 2 if name == "a" and not models else None
        models.append(FakeEngine(replace(FAKE_MODEL, name=name), hold_after=hold, state_key=name))
        return models[-1]

    loader = FakeLoader(THREE, budget=4, make=held)
    starts = await run_over_a_swap(bus, loader, swap_seconds=0.2)
    assert starts == [(1, []), (1, [2])]


async def test_a_model_that_fails_is_not_served_and_does_not_end_the_worker() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE, wrong={"b": "a part is missing"})
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        waiting = await api.create(spec(model="b"))
        failed = await announced(bus, "b", ModelState.FAILED)
        assert failed.failure == "m.toml: entry b: source: a part is missing"
        assert all(worker.model.name != "b" for worker in await bus.workers.workers())
        await run(api, "c")
        await run(api, "a")
        # A worker that can load it gets the job that waits.
        async with catalogue_worker(bus, FakeLoader({"b": 4}), name="w2"):
            assert (await api.reaches(waiting.name, SUCCEEDED)).worker == "w2/b"


async def test_the_worker_serves_the_others_if_the_first_model_fails() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE, wrong={"a": "no"})
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        await run(api, "b")


async def test_a_worker_without_any_model_ends_with_the_reasons() -> None:
    class Missing(FakeLoader):
        async def find(self, model: object) -> None:  # type: ignore[override]
            raise OperatorError("there is no such folder")

    with pytest.raises(OperatorError, match=r"entry a: there is no such folder\n.*entry b:"):
        async with catalogue_worker(memory_bus(), Missing({"a": 1, "b": 1})):
            pass


async def test_other_models_are_unloaded_if_the_device_lacks_memory_for_one() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE, device_bytes=8)
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        for model in "abc":
            await run(api, model)
        assert loader.loaded == {"b", "c"}
    assert loader.most_bytes == 8


async def test_only_one_of_two_idle_workers_loads_a_model() -> None:
    bus = memory_bus()
    first, second = FakeLoader(THREE, load_seconds=0.2), FakeLoader(THREE, load_seconds=0.2)
    async with (
        catalogue_worker(bus, first, name="w1"),
        catalogue_worker(bus, second, name="w2"),
        running_api(bus) as api,
    ):
        await run(api, "b")
        await run(api, "c")
    assert sorted(first.loads + second.loads) == ["a", "a", "b", "c"]


async def lose_device(bus: Bus, loader: FakeLoader) -> None:
    """Runs a worker until its device is lost in a job of the first model."""
    async with catalogue_worker(bus, loader) as worker, running_api(bus) as api:
        await run(api, "b")
        job = await api.create(spec(model="a", prompt="hold: it", strength=1.0))
        await read_until(api.watch(job.name), "step")
        engine = loader.engines["a"]()
        assert engine is not None
        engine.lose_device()
        del engine
        await asyncio.wait({worker.task}, timeout=60)
        assert worker.task.done()


async def test_a_lost_device_ends_the_worker_with_all_its_models() -> None:
    with pytest.raises(UnavailableError, match="device is lost"):
        await lose_device(memory_bus(), FakeLoader(THREE))


async def test_an_operators_restart_ends_the_worker_and_requeues_its_jobs() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE)
    async with catalogue_worker(bus, loader) as worker, running_api(bus) as api:
        job = await api.create(spec(model="a", prompt="hold: it", strength=1.0))
        await read_until(api.watch(job.name), "step")
        await bus.control.broadcast(WorkerCommand.RESTART)
        with pytest.raises(RestartError):
            await asyncio.wait_for(asyncio.shield(worker.task), 30)
        assert (await api.get(job.name)).state == job_pb2.Job.STATE_QUEUED
        assert await bus.queue.depth("a", Lane.REALTIME) == 1


OPERATOR = (("authorization", "Bearer dev-key"),)


async def command(api: Api, method: str, model: str, worker: str = "") -> list[str]:
    """Loads or unloads a model as an operator; returns the workers of the response."""
    stub = admin_service_pb2_grpc.AdminServiceStub(api.channel)
    request = getattr(admin_service_pb2, f"{method}Request")(model=model, worker=worker)
    response = await getattr(stub, method)(request, metadata=OPERATOR, timeout=60)
    return list(response.workers)


async def test_an_operator_loads_a_model_in_place_of_one_with_jobs() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE, budget=4)
    async with catalogue_worker(bus, loader, model_swap_seconds=0.1), running_api(bus) as api:
        job = await api.create(spec(model="a", prompt="hold: it", strength=1.0))
        await read_until(api.watch(job.name), "step")
        assert await command(api, "LoadModel", "b") == ["w1"]
        await announced(bus, "b", ModelState.LOADED)
        assert await command(api, "LoadModel", "b") == ["w1"]
        await api.reaches(job.name, job_pb2.Job.STATE_QUEUED)
        assert loader.loaded == {"b"}
    assert loader.loads[:2] == ["a", "b"]


async def test_an_operator_unloads_a_model_and_the_next_request_loads_it_again() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE)
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        assert await command(api, "UnloadModel", "a", "w1/a") == ["w1"]
        await announced(bus, "a", ModelState.COLD)
        async with asyncio.timeout(30):
            while loader.loaded:  # noqa: ASYNC110 - it is announced before its memory is free
                await asyncio.sleep(0.005)
        assert await command(api, "UnloadModel", "a") == []
        await run(api, "a")
    assert loader.loads == ["a", "a"]


async def test_commands_about_models_that_cannot_be_loaded_are_refused() -> None:
    bus = memory_bus()
    async with (
        catalogue_worker(bus, FakeLoader(THREE)),
        running_worker(bus, name="fixed"),
        running_api(bus) as api,
    ):
        refused = []
        for model, worker in (("", ""), ("d", ""), ("fake", ""), ("a", "w2")):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await command(api, "LoadModel", model, worker)
            refused.append(refusal(error.value))
    assert [it.reason for it in refused] == [
        *("INVALID_REQUEST", "MODEL_NOT_FOUND", "NO_CATALOGUE", "INVALID_REQUEST")
    ]
    assert [list(it.violations) for it in refused] == [["model"], [], [], ["worker"]]


async def test_an_operator_retries_a_model_that_failed() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE, wrong={"b": "a part is missing"})
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        await command(api, "LoadModel", "b")
        await announced(bus, "b", ModelState.FAILED)
        models = {each.name: each for each in (await capabilities(api)).models}
        assert models["b"].state == service_pb2.Model.STATE_UNSERVED
        assert list(models["b"].load_failures) == [
            "w1/b: m.toml: entry b: source: a part is missing"
        ]
        assert models["a"].state == service_pb2.Model.STATE_LOADED
        assert models["c"].state == service_pb2.Model.STATE_COLD
        assert [models[name].workers for name in "abc"] == [1, 0, 1]
        loader.wrong.clear()
        await command(api, "LoadModel", "b")
        await announced(bus, "b", ModelState.LOADED)


async def capabilities(api: Api) -> service_pb2.GetCapabilitiesResponse:
    request = service_pb2.GetCapabilitiesRequest()
    return await api.stub.GetCapabilities(request, metadata=OPERATOR, timeout=60)


async def test_requests_without_a_model_get_the_first_one_of_the_catalogue_in_any_state() -> None:
    bus, loader = memory_bus(), FakeLoader({"z": 4, "a": 4}, budget=4)
    async with (
        catalogue_worker(bus, loader),
        running_api(bus, settings(default_model="")) as api,
    ):
        await run(api, "a")
        assert loader.loaded == {"a"}
        assert [each.name for each in (await capabilities(api)).models] == ["z", "a"]
        job = await api.create(spec(strength=1.0))
        assert (await api.reaches(job.name, SUCCEEDED)).spec.model == "z"
    assert loader.loads == ["z", "a", "z"]


async def test_models_of_two_owners_are_two_models() -> None:
    bus, loader = memory_bus(), FakeLoader({"x/model": 4, "y/model": 4, "y/other": 4})
    async with catalogue_worker(bus, loader), running_api(bus) as api:
        names = ["x/model", "y/model", "other"]
        jobs = [await run(api, name) for name in names]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await api.create(spec(model="model"))
    assert [job.spec.model for job in jobs] == ["x/model", "y/model", "y/other"]
    assert refusal(error.value).reason == "MODEL_NOT_FOUND"


async def test_a_warning_says_that_no_worker_serves_the_model() -> None:
    bus = memory_bus()
    async with catalogue_worker(bus, FakeLoader(THREE)):
        pass
    async with running_api(bus) as api:
        job = await api.create(spec(model="b"))
        assert job.state_reason == "MODEL_UNSERVED"
        assert job.warning.startswith("No worker serves the model b now. The job waits until one ")
        async with catalogue_worker(bus, FakeLoader(THREE)):
            ended = await api.reaches(job.name, SUCCEEDED)
            assert (ended.warning, ended.state_reason) == ("", "")
            assert (await api.create(spec(model="c"))).warning == ""


async def test_a_queued_job_says_why_its_model_cannot_be_loaded_and_runs_once_it_can() -> None:
    bus, loader = memory_bus(), FakeLoader(THREE, wrong={"b": "its vae is damaged"})
    async with (
        catalogue_worker(bus, loader),
        running_api(bus, settings(heartbeat_seconds=0.05)) as api,
    ):
        job = await api.create(spec(model="b", strength=1.0))
        watching = api.watch(job.name)
        async for message in watching:
            waiting = message.event.snapshot.job
            if waiting.state_reason == "MODEL_UNSERVED":
                break
        for each in (waiting, await api.get(job.name)):
            assert each.state == job_pb2.Job.STATE_QUEUED
            assert "No worker can load the model b now; Model.load_failures says" in each.warning
            assert "The job waits until one can, until 20" in each.warning
            assert "m.toml" not in each.warning
        loader.wrong.clear()
        await bus.control.command_model(ModelCommand(worker="w1/b", loads=True))
        *_, end = await read_until(watching, "succeeded")
        assert end.event.succeeded.job.warning == ""


async def test_a_model_that_no_worker_serves_leaves_the_list_after_the_stated_time(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings(unserved_model_hours=0.5 / 3600)
    async with connect_bus(config) as bus:
        await bus.workers.announce(WorkerInfo(name="w", model=FAKE_MODEL, device="cpu"))
        assert [model.name for model in await bus.workers.models()] == ["fake"]
        async with asyncio.timeout(30):
            while await bus.workers.models():  # noqa: ASYNC110 - nothing announces the end
                await asyncio.sleep(0.05)
        async with running_api(bus) as api:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await api.create(spec(model="fake"))
        assert refusal(error.value).reason == "NO_MODEL"
    # A longer time applies to a bucket that exists.
    longer = config.model_copy(update={"unserved_model_hours": 1.0})
    async with connect_bus(longer) as bus:
        await bus.workers.announce(WorkerInfo(name="w", model=FAKE_MODEL, device="cpu"))
        await asyncio.sleep(0.7)
        assert await bus.workers.model("fake") is not None
