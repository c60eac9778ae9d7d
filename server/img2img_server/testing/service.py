"""The service in one event loop: a real gRPC api and a worker, without NATS, S3, model and GPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from img2img_server.api.keys import KeyRing
from img2img_server.api.server import Webhooks, serve
from img2img_server.imaging.base import FetchError
from img2img_server.nats.bus import Bus
from img2img_server.settings import Settings
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine, FixedSafetyChecker
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.webhooks.sender import Outcome
from img2img_server.webhooks.signature import Signer
from img2img_server.worker.server import work

SETTINGS: dict[str, Any] = {
    "grpc_port": 0,
    "metrics_port": 0,
    "dev_key": True,
    "default_model": FAKE_MODEL.name,
    "drain_seconds": 2.0,
    "log_level": "error",
}


@dataclass(frozen=True, slots=True)
class RunningService:
    """A running service. `channel` leads to its api at `target`; the API key is "dev-key"."""

    target: str
    channel: grpc.aio.Channel
    engine: FakeEngine
    blobs: MemoryBlobStore
    bus: Bus


@asynccontextmanager
async def running_service(engine: FakeEngine | None = None) -> AsyncIterator[RunningService]:
    """Runs api and worker until the end of the block.

    The fake engine generates images of the requested size and seed without a model. Init images
    must be sent as bytes or data URIs, because downloads and webhooks fail.
    """
    engine, blobs, bus = engine or FakeEngine(), MemoryBlobStore(), memory_bus()
    settings = Settings(**SETTINGS)
    await blobs.prepare()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    announced: asyncio.Future[Any] = loop.create_future()
    address: asyncio.Future[Any] = loop.create_future()
    checker, webhooks = FixedSafetyChecker(0.0), Webhooks(_no_post, Signer())
    working = work(
        settings, "worker", bus, blobs, engine, checker, stop, lambda: announced.set_result(None)
    )
    keys = KeyRing(None, dev_key=True)
    serving = serve(settings, bus, _no_fetch, webhooks, keys, stop, address.set_result)
    tasks = [asyncio.create_task(working), asyncio.create_task(serving)]
    try:
        for task, started in zip(tasks, (announced, address), strict=True):
            await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        limits = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        async with grpc.aio.insecure_channel(address.result(), limits) as channel:
            yield RunningService(address.result(), channel, engine, blobs, bus)
    finally:
        engine.release()
        stop.set()
        await asyncio.gather(*tasks)
        await asyncio.to_thread(engine.stop)


async def _no_fetch(*_: object) -> bytes:
    raise FetchError


async def _no_post(*_: object) -> Outcome:
    return Outcome(delivered=False, reason="webhooks are not sent")
