"""Measures the innocent tenant's calls, and the memory of processes."""

from __future__ import annotations

import asyncio
import base64
import io
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc
import psutil
from PIL import Image

from benchmarks.attack.target import Target
from img2img.v1 import job_pb2, service_pb2, service_pb2_grpc

CALL_SECONDS = 20.0  # An innocent call that takes longer counts as failed.
PAUSE_SECONDS = 0.2
SAMPLE_SECONDS = 0.25
IMG2IMG = "/api/v6/realtime/img2img"


def _photo() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((256, 256)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


PHOTO = _photo()


@dataclass
class Latencies:
    """The calls of one way into the service. `failures`: why calls failed."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def worst(self) -> float:
        return max(self.seconds)


async def call_grpc(target: Target) -> str:
    """Calls Generate over a connection of its own. Returns why it failed; empty if it succeeded."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target.grpc_address, options) as channel:
        stub = service_pb2_grpc.Img2ImgServiceStub(channel)
        spec = job_pb2.JobSpec(
            prompt="a harbour", init_image=job_pb2.InitImage(data=PHOTO), width=256, height=256
        )
        request = service_pb2.GenerateRequest(spec=spec)
        last = ""
        try:
            metadata = target.metadata("innocent")
            async for message in stub.Generate(request, metadata=metadata, timeout=CALL_SECONDS):
                last = message.event.WhichOneof("event")
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "" if last == "succeeded" else f"the last event is {last}"


def _body() -> dict[str, object]:
    init_image = base64.b64encode(PHOTO).decode()
    return {
        "prompt": "a harbour",
        "init_image": f"data:image/jpeg;base64,{init_image}",
        "width": 256,
        "height": 256,
    }


async def call_http(target: Target) -> str:
    """Posts a job with the key in a header. Returns why it failed; empty if it succeeded."""
    return await _post(target, _body(), {"Authorization": f"Bearer {target.keys['innocent']}"})


async def call_http_body_key(target: Target) -> str:
    """Posts a job with the key in the body. Returns why it failed; empty if it succeeded."""
    return await _post(target, {"key": target.keys["innocent"], **_body()}, {})


async def _post(target: Target, body: dict[str, object], headers: dict[str, str]) -> str:
    timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(target.http_url + IMG2IMG, json=body, headers=headers) as answer,
        ):
            text = await answer.text()
            succeeded = answer.status == 200 and '"success"' in text
            return "" if succeeded else f"{answer.status}: {text[:150]}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"


WAYS: dict[str, Callable[[Target], Awaitable[str]]] = {
    "grpc": call_grpc,
    "http": call_http,
    "body": call_http_body_key,
}


async def innocent_calls(
    target: Target, *, least: int, seconds: float = 0.0
) -> dict[str, Latencies]:
    """Calls every way in turn, `least` times at least and for `seconds` at least.

    Ends early once the calls take far longer.
    """
    found = {way: Latencies() for way in WAYS}
    began, count = time.monotonic(), 0
    while count < least or time.monotonic() - began < seconds:
        for way, call in WAYS.items():
            start = time.monotonic()
            reason = await call(target)
            found[way].seconds.append(time.monotonic() - start)
            if reason:
                found[way].failures.append(reason)
        # Calls that take this long are red already; more of them would only take time.
        if time.monotonic() - began > seconds + CALL_SECONDS:
            break
        count += 1
        await asyncio.sleep(PAUSE_SECONDS)
    return found


def pss_bytes(pid: int) -> int:
    """Returns the proportional set size of a process and its children; 0 if it has ended."""
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(OSError, IndexError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                line = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
                total += int(line.split()[1]) * 1024
    return total


@asynccontextmanager
async def peak_memory(processes: dict[str, int]) -> AsyncIterator[dict[str, int]]:
    """Yields a dictionary that has the peak of each process in bytes when the context ends."""
    peaks = dict.fromkeys(processes, 0)

    def sample() -> None:
        for name, pid in processes.items():
            peaks[name] = max(peaks[name], pss_bytes(pid))

    async def watch() -> None:
        while True:
            await asyncio.to_thread(sample)
            await asyncio.sleep(SAMPLE_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield peaks
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        sample()
