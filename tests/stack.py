"""The service in one process: a real gRPC api, a worker with the fake engine, and a bus in
memory.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from img2img.v1 import job_pb2, service_pb2, service_pb2_grpc
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.api.server import Webhooks, serve
from img2img_server.engine.base import Engine
from img2img_server.imaging.base import FetchError
from img2img_server.lifecycle import RestartError
from img2img_server.nats.bus import Bus
from img2img_server.safety.base import SafetyChecker
from img2img_server.settings import Settings
from img2img_server.storage.interface import BlobStore
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine, FixedSafetyChecker
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.webhooks.sender import Outcome
from img2img_server.webhooks.signature import Signer
from img2img_server.worker.server import work

Fetch = Callable[[str], Awaitable[bytes]]
WAIT_SECONDS = 60.0
DEV = (("authorization", "Bearer dev-key"),)


def settings(**changes: Any) -> Settings:
    """Returns settings for a test: free ports, the development key and the fake model."""
    base: dict[str, Any] = {
        "grpc_port": 0,
        "metrics_port": 0,
        "dev_key": True,
        "cors_origins": "*",
        "default_model": FAKE_MODEL.name,
        "drain_seconds": 2.0,
        "log_level": "error",
    }
    return Settings(**(base | changes))


def photo(width: int = 128, height: int = 128, *, form: str = "JPEG", seed: int = 0) -> bytes:
    """Returns a small image with some content, as a file."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def spec(**changes: Any) -> job_pb2.JobSpec:
    """Returns a small valid request. `changes` replace its fields."""
    fields: dict[str, Any] = {
        "prompt": "a harbour at dusk",
        "init_image": job_pb2.InitImage(data=photo()),
        "width": 256,
        "height": 256,
        "seed": 1,
    }
    return job_pb2.JobSpec(**(fields | changes))


async def no_fetch(_: str) -> bytes:
    """Replaces the download of init images, which tests do not use."""
    raise FetchError


async def no_post(*_: object) -> Outcome:
    """Replaces the sender of webhooks, which tests do not use."""
    return Outcome(delivered=False, reason="nowhere")


@dataclass
class Api:
    """A running api and methods that call it."""

    address: str
    channel: grpc.aio.Channel
    stop: asyncio.Event

    @property
    def stub(self) -> service_pb2_grpc.Img2ImgServiceStub:
        return service_pb2_grpc.Img2ImgServiceStub(self.channel)

    def generate(self, job_spec: job_pb2.JobSpec, **fields: Any) -> Any:
        request = service_pb2.GenerateRequest(spec=job_spec, **fields)
        return self.stub.Generate(request, metadata=DEV, timeout=WAIT_SECONDS)

    async def create(self, job_spec: job_pb2.JobSpec, **fields: Any) -> job_pb2.Job:
        request = service_pb2.CreateJobRequest(spec=job_spec, **fields)
        return (await self.stub.CreateJob(request, metadata=DEV, timeout=WAIT_SECONDS)).job

    async def get(self, name: str) -> job_pb2.Job:
        request = service_pb2.GetJobRequest(name=name)
        return (await self.stub.GetJob(request, metadata=DEV, timeout=WAIT_SECONDS)).job

    async def reaches(self, name: str, state: int, metadata: Any = DEV) -> job_pb2.Job:
        """Returns the job once it is in that state. It polls, because a watch would prevent the
        job's cancellation.
        """
        request = service_pb2.GetJobRequest(name=name)
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                job = (await self.stub.GetJob(request, metadata=metadata)).job
                if job.state == state:
                    return job
                await asyncio.sleep(0.005)

    async def cancel(self, name: str) -> job_pb2.Job:
        request = service_pb2.CancelJobRequest(name=name)
        return (await self.stub.CancelJob(request, metadata=DEV, timeout=WAIT_SECONDS)).job

    def watch(self, name: str, after: int = 0) -> Any:
        request = service_pb2.WatchJobRequest(name=name, after_sequence=after)
        return self.stub.WatchJob(request, metadata=DEV, timeout=WAIT_SECONDS)


@asynccontextmanager
async def running_api(
    bus: Bus,
    config: Settings | None = None,
    *,
    fetch: Fetch = no_fetch,
    keys: KeyRing | None = None,
    webhooks: Webhooks | None = None,
    blobs: BlobStore | None = None,
) -> AsyncIterator[Api]:
    """Yields a real gRPC server on a free port, with NATS or its in-memory implementation."""
    config = config or settings()

    async def fetched(url: str, report: Callable[[int], None]) -> bytes:
        data = await fetch(url)
        report(len(data))
        return data

    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    sending = webhooks or Webhooks(no_post, Signer())
    ring = keys or KeyRing(None, dev_key=True)
    serving = asyncio.create_task(
        serve(config, bus, fetched, sending, ring, stop, address.set_result, blobs=blobs)
    )
    await asyncio.wait({serving, address}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    try:
        async with grpc.aio.insecure_channel(address.result(), options=options) as channel:
            yield Api(address.result(), channel, stop)
    finally:
        stop.set()
        await serving


@dataclass
class RunningWorker:
    """A worker with its engine. `stop` drains it."""

    engine: Any  # a FakeEngine, unless a test uses another one
    blobs: MemoryBlobStore
    stop: asyncio.Event
    task: asyncio.Task[None]

    async def drained(self) -> None:
        self.stop.set()
        await self.task


@asynccontextmanager
async def running_worker(
    bus: Bus,
    engine: Engine | None = None,
    *,
    name: str = "w1",
    blobs: MemoryBlobStore | None = None,
    safety: SafetyChecker | None = None,
    config: Settings | None = None,
) -> AsyncIterator[RunningWorker]:
    """Yields a worker that is announced and pulls jobs."""
    engine = engine or FakeEngine()
    blobs = blobs or MemoryBlobStore()
    stop = asyncio.Event()
    if isinstance(blobs, MemoryBlobStore):
        await blobs.prepare()
    checker = safety or FixedSafetyChecker(0.0)
    working = work(config or settings(), name, bus, blobs, engine, checker, stop)
    task = asyncio.create_task(working)
    try:
        while all(worker.name != name for worker in await bus.workers.workers()):
            if task.done():
                task.result()
            await asyncio.sleep(0.001)
        yield RunningWorker(engine, blobs, stop, task)
    finally:
        if isinstance(engine, FakeEngine):
            engine.release()
        stop.set()
        if not task.cancelled():  # A test may have killed the worker.
            with suppress(RestartError):  # The worker is not restarted.
                await task
        await asyncio.to_thread(engine.stop)


@dataclass
class Stack:
    """Bus, worker and api of one service."""

    bus: Bus
    api: Api
    worker: RunningWorker


@asynccontextmanager
async def running_stack(
    engine: Engine | None = None,
    *,
    fetch: Fetch = no_fetch,
    api_config: Settings | None = None,
    **worker: Any,
) -> AsyncIterator[Stack]:
    """Yields a bus, a worker and an api."""
    bus = memory_bus()
    async with (
        running_worker(bus, engine, **worker) as running,
        running_api(bus, api_config, fetch=fetch, blobs=running.blobs) as api,
    ):
        yield Stack(bus, api, running)


def two_tenants(folder: Path) -> tuple[KeyRing, str, str]:
    """Returns a key ring with the tenants "a" (with the permission unsafe) and "b" (without), and
    their keys.
    """
    key_a, entry_a = new_key("a", ["unsafe"])
    key_b, entry_b = new_key("b", [])
    file = folder / "keys.toml"
    file.write_text(f"{entry_a}\n{entry_b}\n")
    return KeyRing(file, dev_key=False), key_a, key_b


@dataclass
class Refusal:
    """The error of an RPC with its details."""

    code: grpc.StatusCode
    reason: str
    violations: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    retry_seconds: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Returns the error of an RPC with its details."""
    found = Refusal(error.code(), "")
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for packed in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            assert info.domain == "img2img.v1"
            found.reason, found.metadata = info.reason, dict(info.metadata)
        elif packed.Unpack(bad):
            found.violations = {v.field: v.description for v in bad.field_violations}
            found.reasons = {v.field: v.reason for v in bad.field_violations}
        elif packed.Unpack(retry):
            found.retry_seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return found


def kinds(messages: list[Any]) -> list[str]:
    """Returns the kinds of the events of a stream."""
    return [str(message.event.WhichOneof("event")) for message in messages]


async def read_until(call: Any, kind: str, into: list[Any] | None = None) -> list[Any]:
    """Reads a stream up to the first event of this kind."""
    messages = [] if into is None else into
    async for message in call:
        messages.append(message)
        if message.event.WhichOneof("event") == kind:
            return messages
    raise AssertionError(f"no {kind} in {kinds(messages)}")


async def known_model(bus: Bus) -> None:
    """Announces the fake model without a worker: jobs are queued and do not run."""
    async with running_worker(bus):
        pass
