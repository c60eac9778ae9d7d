"""Real signals to real processes: the end of a role that starts, is slow or hangs."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from img2img_server.settings import Settings
from tests.processes import Role

STUCK_THREAD = """
import asyncio, threading, time
from img2img_server.last_line import exit_now
from img2img_server.lifecycle import run_role
async def role(stop):
    upload = asyncio.create_task(asyncio.to_thread(time.sleep, 600))
    print("up", flush=True)
    await stop.wait()
run_role(role)
exit_now(0)
"""
ENDLESS_DRAIN = """
import asyncio
from img2img_server.last_line import exit_now
from img2img_server.lifecycle import run_role
async def role(stop):
    print("up", flush=True)
    await stop.wait()
    print("draining", flush=True)
    await asyncio.Event().wait()
run_role(role)
exit_now(0)
"""


async def started(program: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    await says(process, "up")
    return process


async def says(process: asyncio.subprocess.Process, word: str) -> None:
    assert process.stdout is not None
    while word not in (line := (await process.stdout.readline()).decode()):
        assert line, "it ended"


async def ended(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(15):
        return await process.wait()


async def test_a_role_that_has_ended_does_not_wait_for_a_thread_that_hangs() -> None:
    process = await started(STUCK_THREAD)
    process.send_signal(signal.SIGTERM)
    assert await ended(process) == 0


async def test_a_second_signal_ends_a_draining_role_at_once() -> None:
    process = await started(ENDLESS_DRAIN)
    process.send_signal(signal.SIGTERM)
    await says(process, "draining")
    process.send_signal(signal.SIGINT)
    assert await ended(process) == 128 + signal.SIGINT


async def test_a_worker_that_still_loads_its_model_ends_when_it_is_asked_to(
    engine_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    config = engine_settings()
    environment = {
        "IMG2IMG_NATS_URL": config.nats_url.get_secret_value(),
        "IMG2IMG_S3_ENDPOINT_URL": config.s3_endpoint_url,
        "IMG2IMG_S3_ACCESS_KEY": config.s3_access_key.get_secret_value(),
        "IMG2IMG_S3_SECRET_KEY": config.s3_secret_key.get_secret_value(),
        "IMG2IMG_S3_BUCKET": config.s3_bucket,
    }
    worker = Role("worker", environment, tmp_path / "worker.log")
    await worker.launch()
    await worker.until("/livez")  # The process has not imported torch yet.
    assert await worker.stop() == 0
    log = worker.log.read_text()
    assert "stopped_before_ready" in log
    assert "worker_serves" not in log
