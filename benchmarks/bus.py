"""Measures the load of a job on NATS: messages and bytes of each side, the time of each operation.

    python -m benchmarks.bus            one nats-server, one replica
    python -m benchmarks.bus --cluster  three on this machine, three replicas

A job is the photo of examples/ at 512x512 with 14 steps: api and worker are the real ones, the
engine is the fake engine of the tests, so that only the service itself is measured. Messages
and bytes are counted by the clients (`nc.stats`). CPU time is measured for the servers'
processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from img2img_client import AsyncClient
from img2img_server.devstack.nats import nats_server, nats_url
from img2img_server.domain.events import StepFinished
from img2img_server.domain.params import Lane
from img2img_server.interfaces.queue import QueuedJob
from img2img_server.nats import subjects
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.nats.connection import NatsConnection
from img2img_server.ports import free_ports
from img2img_server.settings import Settings
from img2img_server.testing.fake_engine import FakeEngine
from tests.nats_cluster import nats_cluster
from tests.stack import running_api, running_worker, settings

PHOTO = Path(__file__).parents[1] / "examples" / "cat.jpg"
JOBS, AT_ONCE, OPERATIONS = 100, 8, 400
REQUEST: dict[str, Any] = {"strength": 0.7, "num_inference_steps": 20}  # 14 of the 20 steps run
STATS = ("out_msgs", "out_bytes", "in_msgs", "in_bytes")


@asynccontextmanager
async def servers(folder: Path, *, cluster: bool) -> AsyncIterator[Settings]:
    """Yields settings for running NATS servers."""
    if cluster:
        async with nats_cluster(folder) as running:
            yield settings(nats_url=running.url, nats_replicas=3, queue_limit=2 * OPERATIONS)
        return
    port = free_ports(1)[0]
    server = nats_server(folder, port, "benchmark")
    await server.start()
    try:
        yield settings(nats_url=nats_url(port, "benchmark"), queue_limit=2 * OPERATIONS)
    finally:
        await server.stop()


def link_of(bus: Bus) -> NatsConnection:
    return bus.queue._link  # type: ignore[attr-defined, no-any-return]


def cpu_seconds() -> float:
    """Returns the CPU time of all started nats-servers."""
    times = [
        child.cpu_times()
        for child in psutil.Process().children(recursive=True)
        if "nats-server" in child.name()
    ]
    return sum(each.user + each.system for each in times)


async def jobs(config: Settings) -> dict[str, Any]:
    """Runs whole jobs. Returns messages and bytes of each connection for one job."""
    async with connect_bus(config) as api_bus, connect_bus(config) as worker_bus:
        links = {"api": link_of(api_bus), "worker": link_of(worker_bus)}
        async with (
            running_worker(worker_bus, FakeEngine(max_batch_size=AT_ONCE), config=config),
            running_api(api_bus, config) as api,
            AsyncClient(api.address, api_key="dev-key") as client,
        ):
            gate, inline_bytes = asyncio.Semaphore(AT_ONCE), 0

            async def one(seed: int) -> None:
                nonlocal inline_bytes
                async with gate:
                    result = await client.generate("a cat", PHOTO, seed=seed, **REQUEST)
                inline_bytes = len(result.images[0].data)

            await one(0)
            before = {name: dict(link.nc.stats) for name, link in links.items()}
            cpu, began = cpu_seconds(), time.monotonic()
            await asyncio.gather(*(one(seed) for seed in range(JOBS)))
            took, cpu = time.monotonic() - began, cpu_seconds() - cpu
            found: dict[str, Any] = {
                name: {
                    stat: round((link.nc.stats[stat] - before[name][stat]) / JOBS, 1)
                    for stat in STATS
                }
                for name, link in links.items()
            }
    return found | {
        "jobs_per_second": round(JOBS / took, 1),
        "server_cpu_ms": round(1000 * cpu / JOBS, 2),
        "init_image_bytes": PHOTO.stat().st_size,
        "inline_image_bytes": inline_bytes,
    }


async def operation(do: Callable[[int], Awaitable[object]]) -> dict[str, float]:
    """Measures the milliseconds of sequential operations, then the rate and the servers' CPU time
    with 32 operations at a time.
    """
    for number in range(5):
        await do(number)
    began = time.monotonic()
    for number in range(OPERATIONS // 4):
        await do(1000 + number)
    alone = (time.monotonic() - began) / (OPERATIONS // 4)
    gate = asyncio.Semaphore(32)

    async def gated(number: int) -> None:
        async with gate:
            await do(number)

    cpu, began = cpu_seconds(), time.monotonic()
    await asyncio.gather(*(gated(10_000 + number) for number in range(OPERATIONS)))
    took, cpu = time.monotonic() - began, cpu_seconds() - cpu
    return {
        "milliseconds": round(1000 * alone, 2),
        "per_second": round(OPERATIONS / took),
        "server_cpu_ms": round(1000 * cpu / OPERATIONS, 2),
    }


async def operations(config: Settings) -> dict[str, Any]:
    """Measures the operations of a job."""
    step = StepFinished(sample=0, step=1, total=14, sigma=1.0)
    image = PHOTO.read_bytes()
    async with connect_bus(config) as bus:
        link = link_of(bus)

        async def append(number: int) -> None:
            await (await bus.events.open(number, fresh=True)).append(step)

        async def put(number: int) -> None:
            job = QueuedJob(job_id=number, tenant="t", init_image=image)
            await bus.queue.put(job, "m", Lane.BATCH)

        async def pull(_: int) -> None:
            (delivery,) = await bus.queue.pull("m", [Lane.BATCH], 1, 5.0)
            await delivery.ack()

        async def watch(number: int) -> None:
            async with bus.events.watch(number):
                pass

        async def write(number: int) -> None:
            await link.publish(
                subjects.key_subject(subjects.RECORDS_BUCKET, f"t.{number}"), b"x" * 1000
            )

        async def read(_: int) -> None:
            bucket = subjects.RECORDS_BUCKET
            await link.last(subjects.bucket_stream(bucket), subjects.key_subject(bucket, "t.1000"))

        todo = {
            "append an event": append,
            "write a record (1 kB)": write,
            "read a record": read,
            f"queue a job ({len(image) // 1000} kB)": put,
            "pull and ack a job": pull,
            "open and close a watch": watch,
        }
        return {name: await operation(do) for name, do in todo.items()}


async def measure(*, cluster: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        async with servers(Path(folder), cluster=cluster) as config:
            return {
                "servers": 3 if cluster else 1,
                "replicas": config.nats_replicas,
                "a job": await jobs(config),
                "operations": await operations(config),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", action="store_true")
    print(json.dumps(asyncio.run(measure(cluster=parser.parse_args().cluster)), indent=2))


if __name__ == "__main__":
    main()
