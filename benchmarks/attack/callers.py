"""Calls that attackers make over and over: gRPC calls with a key, and raw HTTP requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from benchmarks.attack.target import ATTACKER_HOST, Progress, Target
from img2img.v1 import job_pb2, service_pb2, service_pb2_grpc

SECONDS = 60.0  # the deadline of an attacker's call
UNLIMITED = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


@asynccontextmanager
async def stub_of(target: Target) -> AsyncIterator[service_pb2_grpc.Img2ImgServiceStub]:
    """Yields a stub on a connection of its own."""
    async with grpc.aio.insecure_channel(target.grpc_address, UNLIMITED) as channel:
        yield service_pb2_grpc.Img2ImgServiceStub(channel)


def spec(image: bytes | str, **fields: Any) -> job_pb2.JobSpec:
    """Returns a request with an init image, which is a file or its address."""
    source = {"url": image} if isinstance(image, str) else {"data": image}
    chosen: dict[str, Any] = {"prompt": "a harbour", "width": 256, "height": 256} | fields
    return job_pb2.JobSpec(init_image=job_pb2.InitImage(**source), **chosen)


async def repeat(progress: Progress, call: Callable[[], Awaitable[Any]]) -> None:
    """Calls for ever, a new call as soon as one ends, and counts how the calls ended."""
    while True:
        try:
            await call()
            progress.outcomes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            progress.outcomes[error.code().name] += 1
        except (OSError, EOFError) as error:
            progress.outcomes[type(error).__name__] += 1
        await asyncio.sleep(0.01)  # A refused call costs the attacker the way there and back.


async def create_jobs(
    target: Target, progress: Progress, specs: list[job_pb2.JobSpec], *, tenant: str = "attacker-1"
) -> None:
    """Creates jobs for ever with as many calls at a time as there are specs."""
    metadata = target.metadata(tenant)
    async with stub_of(target) as stub:

        async def create(request: service_pb2.CreateJobRequest) -> None:
            await stub.CreateJob(request, metadata=metadata, timeout=SECONDS)

        async with asyncio.TaskGroup() as group:
            for one in specs:
                request = service_pb2.CreateJobRequest(spec=one)
                group.create_task(repeat(progress, lambda request=request: create(request)))
            progress.under_way()


async def connect(
    port: int, *, source: str = ATTACKER_HOST
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Opens a connection to a port of 127.0.0.1, from a loopback address."""
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))


async def hold_open(
    progress: Progress, port: int, data: bytes, *, source: str = ATTACKER_HOST, trickle: bytes = b""
) -> None:
    """Sends data and keeps the connection open; connects again whenever the server closes it.

    Args:
        trickle: Sent byte by byte, one a second, for ever.
    """
    while True:
        writer = None
        try:
            reader, writer = await connect(port, source=source)
            writer.write(data)
            await writer.drain()
            progress.outcomes["held"] += 1
            answer = b""
            if trickle:
                answer = await _trickle(reader, writer, trickle)
            else:
                answer = await reader.read(4096)
            progress.outcomes[f"answered {answer[9:12].decode(errors='replace') or 'closed'}"] += 1
        except OSError as error:
            progress.outcomes[type(error).__name__] += 1
        finally:
            if writer is not None:
                writer.close()
        await asyncio.sleep(2.0)  # A server that refuses connections is not flooded with them.


async def _trickle(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trickle: bytes
) -> bytes:
    at = 0
    while True:
        writer.write(trickle[at : at + 1])
        await writer.drain()
        at = (at + 1) % len(trickle)
        try:
            async with asyncio.timeout(1.0):
                return await reader.read(4096)
        except TimeoutError:
            continue


def post(path: str, length: int, body: bytes, *, key: str = "", more: str = "") -> bytes:
    """Returns a POST that announces a body of this length and has this beginning of it."""
    headers = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if key:
        headers += f"Authorization: Bearer {key}\r\n"
    return f"{headers}Content-Length: {length}\r\n{more}\r\n".encode() + body
