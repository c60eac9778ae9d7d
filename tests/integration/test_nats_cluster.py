"""Three NATS servers with three replicas: one server dies under load, and no job is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from img2img_client import AsyncClient, Result
from img2img_server.nats import subjects
from img2img_server.nats.bus import connect_bus
from img2img_server.nats.connection import connect
from img2img_server.settings import Settings
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.worker.server import RECONNECT_WAIT_SECONDS
from tests.nats_cluster import NAMES, NatsCluster, nats_cluster
from tests.stack import photo, running_api, running_worker, settings

CALLERS, JOBS_EACH = 16, 8
BEFORE = 24  # number of jobs that have ended when the server dies


@asynccontextmanager
async def service(config: Settings) -> AsyncIterator[AsyncClient]:
    """Yields an api and a worker, each with its own connection."""
    engine = FakeEngine(step_seconds=0.02, max_batch_size=4)
    async with (
        connect_bus(config) as api_bus,
        connect_bus(config, reconnect_wait_seconds=RECONNECT_WAIT_SECONDS) as worker_bus,
        running_worker(worker_bus, engine, config=config),
        running_api(api_bus, config) as api,
        AsyncClient(api.address, api_key="dev-key") as client,
    ):
        yield client


# nats-py leaves a StreamWriter open if a server does not respond while connecting.
@pytest.mark.filterwarnings(r"ignore:.*StreamWriter:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "frozen"])
async def test_a_streams_leader_is_lost_under_load_and_every_job_ends_once(
    tmp_path: Path, end: str
) -> None:
    image, results, reached = photo(256, 256), list[Result](), asyncio.Event()

    async def caller(client: AsyncClient, seed: int) -> None:
        for _ in range(JOBS_EACH):
            result = await client.generate(
                "p", image, seed=seed, num_inference_steps=4, width=256, height=256
            )
            results.append(result)
            if len(results) == BEFORE:
                reached.set()

    async with nats_cluster(tmp_path / "nats") as cluster:
        config = settings(nats_url=cluster.url, nats_replicas=3, queue_limit=100)
        async with service(config) as client, asyncio.TaskGroup() as callers:
            for seed in range(CALLERS):
                callers.create_task(caller(client, seed))
            await reached.wait()
            dead = await cluster.leader(subjects.JOBS)
            if end == "killed":
                await cluster.kill(dead)
            else:
                cluster.freeze(dead)
        if end == "frozen":
            await cluster.kill(dead)
        assert await cluster.leader(subjects.JOBS) in set(NAMES) - {dead}
        assert await replicas(cluster) == {3}
        async with connect_bus(config) as bus:  # One of its addresses has no server.
            assert [model.name for model in await bus.workers.models()] == ["fake"]
    ended = [(result.job.state, len(result.images)) for result in results]
    assert ended == [("succeeded", 1)] * (CALLERS * JOBS_EACH)
    assert {result.job.attempt for result in results} == {1}
    assert len({result.job.name for result in results}) == len(results)
    by_seed = {result.images[0].seed: result.images[0].sha256 for result in results}
    assert all(by_seed[r.images[0].seed] == r.images[0].sha256 for r in results)


async def replicas(cluster: NatsCluster) -> set[int]:
    """Returns the number of replicas of each stream and bucket."""
    async with connect(cluster.url.split(",")) as link:
        return {info.config.num_replicas for info in await link.js.streams_info()}
