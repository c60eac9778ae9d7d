"""An api and workers with simulated devices on a real nats-server, and jobs with their times."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fleet.device import MODEL, Costs, simulated_engine
from img2img.v1 import job_pb2, service_pb2
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.devstack.nats import nats_server, nats_url
from img2img_server.nats.bus import connect_bus
from img2img_server.ports import free_ports
from img2img_server.settings import Settings
from tests.stack import Api, photo, running_api, running_worker, settings

TENANTS = tuple("abcdefgh")
QUEUE_LIMIT = 64


@dataclass
class Times:
    """Seconds from the request to the events of one job; `worker`: the one that ended it."""

    tenant: str
    requested: float
    started: float = 0.0
    ended: float = 0.0
    worker: str = ""
    state: str = ""
    timings: job_pb2.Timings = field(default_factory=job_pb2.Timings)

    @property
    def latency(self) -> float:
        return self.ended - self.requested


@dataclass
class Fleet:
    """A running api, to which workers can be added."""

    api: Api
    config: Settings
    costs: Costs
    keys: dict[str, str]
    stack: AsyncExitStack
    engines: list[Any] = field(default_factory=list)
    _seeds: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def add_workers(self, count: int) -> None:
        """Adds workers that are announced."""
        for _ in range(count):
            engine = simulated_engine(self.costs)
            bus = await self.stack.enter_async_context(connect_bus(self.config))
            name = f"w{len(self.engines) + 1}"
            self.engines.append(engine)
            worker = running_worker(bus, engine, name=name, config=self.config)
            await self.stack.enter_async_context(worker)

    async def run(self, tenant: str, steps: int, side: int = 256, **fields: Any) -> Times:
        """Runs one job to its end."""
        spec = job_pb2.JobSpec(
            prompt="a harbour",
            init_image=job_pb2.InitImage(data=PHOTO),
            model=MODEL,
            width=side,
            height=side,
            strength=1.0,
            num_inference_steps=steps,
            scheduler="ddim",
            seed=next(self._seeds),
            output_format=job_pb2.IMAGE_FORMAT_JPEG,
            safety_checker=True,
            **fields,
        )
        times = Times(tenant, time.monotonic())
        call = self.api.stub.Generate(
            service_pb2.GenerateRequest(spec=spec),
            metadata=(("authorization", f"Bearer {self.keys[tenant]}"),),
        )
        async for message in call:
            kind = message.event.WhichOneof("event")
            if kind == "started":
                times.started = time.monotonic()
            if kind in ("succeeded", "failed", "cancelled"):
                times.ended = time.monotonic()
                times.state = kind
                job = getattr(message.event, kind).job
                times.worker, times.timings = job.worker, job.timings
        if times.state != "succeeded":
            raise RuntimeError(f"the job {times.state}")
        return times

    def start(self, tenant: str, steps: int, side: int = 256, **fields: Any) -> asyncio.Task[Times]:
        """Starts a job."""
        return asyncio.create_task(self.run(tenant, steps, side, **fields))

    @property
    def busy_seconds(self) -> float:
        """Returns the seconds that the devices have worked."""
        return float(sum(engine.busy_seconds for engine in self.engines))


PHOTO = photo(256, 256)


@asynccontextmanager
async def running_fleet(folder: Path, costs: Costs, workers: int) -> AsyncIterator[Fleet]:
    """Yields an api with this many workers, on a new nats-server."""
    port = free_ports(1)[0]
    server = nats_server(folder, port, "fleet")
    await server.start()
    pairs = {tenant: new_key(tenant, []) for tenant in TENANTS}
    keys_file = folder / "keys.toml"
    keys_file.write_text("\n".join(entry for _, entry in pairs.values()))
    config = settings(
        nats_url=nats_url(port, "fleet"),
        queue_limit=QUEUE_LIMIT,
        default_model=MODEL,
        dev_key=False,
    )
    try:
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(connect_bus(config))
            ring = KeyRing(keys_file, dev_key=False)
            api = await stack.enter_async_context(running_api(bus, config, keys=ring))
            keys = {tenant: key for tenant, (key, _) in pairs.items()}
            fleet = Fleet(api, config, costs, keys, stack)
            await fleet.add_workers(workers)
            for _ in range(workers):  # Connections and imports are warm afterwards.
                await fleet.run("h", 1)
            yield fleet
    finally:
        await server.stop()
