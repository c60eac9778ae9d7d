"""Streams over unreliable networks, with three callers: the blocking client, the asyncio client,
and a caller that uses WatchJob without our library. Every caller has its own job, which ends once
with all its images.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from img2img.v1 import job_pb2, service_pb2, service_pb2_grpc
from img2img_client import AsyncClient, Client, Retry, channel
from img2img_server.api import server as api_server
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from tests.networks import Relay, StreamProxy
from tests.stack import (
    DEV,
    Api,
    kinds,
    known_model,
    photo,
    running_api,
    running_worker,
    settings,
    spec,
)

GRACE_SECONDS = 3.0
KEEPALIVE = {
    "grpc.keepalive_time_ms": 600,
    "grpc.keepalive_timeout_ms": 1000,
    "grpc.http2.ping_timeout_ms": 1000,
}
SILENCE_SECONDS = 3.0  # seconds without a message after which a caller reconnects
IMAGES = 2
REQUEST = {"prompt": "a harbour", "strength": 1.0, "samples": IMAGES, "width": 256, "height": 256}
COMMAND = [sys.executable, "-c", "from img2img_client.cli import main; main()"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets timeouts so that a lost connection is detected within two seconds."""
    options = api_server.server_options
    fast = {"grpc.http2.min_ping_interval_without_data_ms": 50, **KEEPALIVE}
    monkeypatch.setattr(
        api_server, "server_options", lambda config: [*({**dict(options(config)), **fast}).items()]
    )
    monkeypatch.setattr(
        channel, "CHANNEL_OPTIONS", tuple({**dict(channel.CHANNEL_OPTIONS), **KEEPALIVE}.items())
    )


def retry() -> Retry:
    return Retry(first_delay_seconds=0.05, silence_seconds=SILENCE_SECONDS)


def use_blocking(address: str) -> int:
    """Returns the number of received images."""
    with Client(address, api_key="dev-key", retry=retry()) as client:
        return len(client.generate(init_image=photo(), **REQUEST).images)


async def use_async(address: str) -> int:
    async with AsyncClient(address, api_key="dev-key", retry=retry()) as client:
        return len((await client.generate(init_image=photo(), **REQUEST)).images)


async def use_raw(address: str) -> int:
    """Follows only the rules in the comments of the protocol."""
    options = {"grpc.use_local_subchannel_pool": 1, **KEEPALIVE}
    async with grpc.aio.insecure_channel(address, options=[*options.items()]) as wire:
        stub = service_pb2_grpc.Img2ImgServiceStub(wire)
        request = service_pb2.GenerateRequest(
            spec=spec(strength=1.0, samples=IMAGES), request_id=str(uuid.uuid4())
        )
        messages: list[Any] = []
        name, sequence = "", 0
        while True:
            if name:
                again = service_pb2.WatchJobRequest(name=name, after_sequence=sequence)
                call: Any = stub.WatchJob(again, metadata=DEV, wait_for_ready=True)
            else:
                call = stub.Generate(request, metadata=DEV, wait_for_ready=True)
            try:
                while True:
                    async with asyncio.timeout(SILENCE_SECONDS):
                        message = await call.read()
                    assert message is not grpc.aio.EOF
                    messages.append(message)
                    name, sequence = message.event.job, message.event.sequence
                    if message.event.WhichOneof("event") in ("succeeded", "failed", "cancelled"):
                        assert kinds(messages)[-1] == "succeeded"
                        return kinds(messages).count("sample_finished")
            except (grpc.aio.AioRpcError, TimeoutError):
                call.cancel()


@dataclass
class Scene:
    """An api, the network in front of it, and jobs that wait until `go_on` is called."""

    api: Api
    bus: Any
    engine: FakeEngine
    is_queued: bool
    parts: AsyncExitStack
    callers: list[asyncio.Task[int]] = field(default_factory=list)

    async def begin(self, address: str) -> None:
        """Starts the callers at the address. Returns when their jobs are in the phase."""
        blocking = asyncio.to_thread(use_blocking, address)
        ways = (blocking, use_async(address), use_raw(address))
        self.callers = [asyncio.create_task(way) for way in ways]
        state = job_pb2.Job.STATE_QUEUED if self.is_queued else job_pb2.Job.STATE_RUNNING
        async with asyncio.timeout(20):
            while [job.state for job in await self.jobs()] != [state] * len(ways):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def go_on(self) -> None:
        """Lets the jobs run to their end."""
        if self.is_queued:
            await self.parts.enter_async_context(running_worker(self.bus, self.engine))
        self.engine.release()

    async def jobs(self) -> list[job_pb2.Job]:
        listed = await self.api.stub.ListJobs(service_pb2.ListJobsRequest(), metadata=DEV)
        return list(listed.jobs)

    async def check(self) -> None:
        """Asserts that every caller has all images and every job ended once."""
        async with asyncio.timeout(30):
            assert await asyncio.gather(*self.callers) == [IMAGES] * 3
        for job in await self.jobs():
            log = kinds([message async for message in self.api.watch(job.name)])
            assert [kind for kind in log if kind in ("succeeded", "cancelled", "failed")] == [
                "succeeded"
            ]
            assert log.count("sample_finished") == IMAGES


@asynccontextmanager
async def scene(phase: str, **changes: Any) -> AsyncIterator[Scene]:
    config = settings(
        **({"disconnect_grace_seconds": GRACE_SECONDS, "heartbeat_seconds": 0.6} | changes)
    )
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    async with AsyncExitStack() as parts:
        if phase == "queued":
            await known_model(bus)
        else:
            await parts.enter_async_context(running_worker(bus, engine))
        api = await parts.enter_async_context(running_api(bus, config))
        yield Scene(api, bus, engine, phase == "queued", parts)


async def at_once(play: Callable[..., Awaitable[None]], *cases: Any) -> None:
    """Runs every case with queued jobs and with running jobs, all at the same time."""
    async with asyncio.TaskGroup() as plays:
        for case, phase in itertools.product(cases, ("queued", "running")):
            plays.create_task(play(case, phase), name=f"{case} {phase}")


@pytest.mark.usefixtures("quick")
async def test_a_connection_that_breaks_costs_no_job_and_no_image() -> None:
    async def play(accident: Callable[[Relay], None], phase: str) -> None:
        async with scene(phase) as stage, Relay(stage.api.address).running() as relay:
            await stage.begin(relay.address)
            accident(relay)
            # longer than the server needs to detect the loss, and than the grace period
            await asyncio.sleep(GRACE_SECONDS + 2.0)
            await stage.go_on()
            await stage.check()

    await at_once(play, Relay.reset, Relay.fall_silent)


def scales() -> list[Any]:
    full = pytest.mark.skipif(
        not os.environ.get("FULL_SCALE"), reason="takes 130 s; FULL_SCALE=1 runs it"
    )
    return [
        pytest.param((0.6, 2.0, 5.0), id="scaled down"),
        pytest.param((15.0, 60.0, 130.0), id="full scale", marks=full),
    ]


@pytest.mark.parametrize("scale", scales())
async def test_heartbeats_keep_a_proxy_from_cutting_a_silent_stream(
    scale: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat, cut_after, silence = scale
    monkeypatch.setattr(sys.modules[__name__], "SILENCE_SECONDS", 3 * heartbeat)

    async def play(seconds: float, phase: str) -> None:
        async with (
            scene(phase, heartbeat_seconds=heartbeat) as stage,
            StreamProxy(stage.api.address, cut_after).running() as proxy,
        ):
            await stage.begin(proxy.address)
            await asyncio.sleep(seconds)
            await stage.go_on()
            await stage.check()
            assert (proxy.cuts, proxy.methods) == (0, ["Generate"] * 3)

    await at_once(play, silence)


async def test_a_stream_that_a_proxy_cuts_is_resumed_before_the_grace_period_is_over() -> None:
    """The api receives RST_STREAM, as from a caller that cancels."""

    async def play(cut_after: float, phase: str) -> None:
        async with (
            scene(phase, heartbeat_seconds=0) as stage,
            StreamProxy(stage.api.address, cut_after).running() as proxy,
        ):
            await stage.begin(proxy.address)
            await asyncio.sleep(GRACE_SECONDS + 1.0)
            await stage.go_on()
            await stage.check()
            assert proxy.cuts >= 6, "every stream was cut again and again"

    await at_once(play, 1.2)


async def test_a_client_that_is_killed_has_its_job_cancelled_after_the_grace_period(
    tmp_path: Path,
) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo())
    async with scene("running", disconnect_grace_seconds=0.3) as stage:
        words = ["generate", "--prompt", "a harbour", "--init-image", str(tmp_path / "photo.jpg")]
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *words, "--server", stage.api.address
        )
        async with asyncio.timeout(20):
            while not (jobs := await stage.jobs()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await stage.api.reaches(jobs[0].name, job_pb2.Job.STATE_CANCELLED)
