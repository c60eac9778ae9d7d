"""Runs a worker role whose engine is the fake one: `python -m benchmarks.fake_worker`.

Queue, store, events and probes are those of the real role. Its jobs need almost no CPU time, so
that a measurement shows the cost of the service alone. `FAKE_STEP_SECONDS` is the length of a step.
"""

from __future__ import annotations

import asyncio
import os

from img2img_server.lifecycle import run_role
from img2img_server.nats.bus import connect_bus
from img2img_server.setting_checks import checked_settings
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.telemetry import configure_logging, probe_server
from img2img_server.testing.fake_engine import FakeEngine, FixedSafetyChecker
from img2img_server.worker.server import work

BATCH_SIZE = 64


async def serve(stop: asyncio.Event) -> None:
    """Runs jobs until `stop` is set."""
    settings = checked_settings("worker")
    configure_logging(settings, "worker")
    engine = FakeEngine(
        step_seconds=float(os.environ.get("FAKE_STEP_SECONDS", "0")), max_batch_size=BATCH_SIZE
    )
    ready = asyncio.Event()

    def why_not_ready() -> str:
        return "" if ready.is_set() else "starting"

    async with (
        probe_server(settings, "worker", why_not_ready),
        connect_bus(settings, stop=stop) as bus,
        connect_blobs(settings) as blobs,
    ):
        await blobs.prepare(settings.startup_timeout_seconds)
        name = settings.worker_name or f"fake-{os.getpid()}"
        store, safety = WatchedBlobs(blobs), FixedSafetyChecker(0.0)
        await work(settings, name, bus, store, engine, safety, stop, ready.set)
    engine.stop()


if __name__ == "__main__":
    run_role(serve)
