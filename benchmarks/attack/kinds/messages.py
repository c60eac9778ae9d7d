"""F4: bytes of gRPC messages that the api holds, with and without a key."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from benchmarks.attack import images
from benchmarks.attack.callers import create_jobs, repeat, spec
from benchmarks.attack.http2 import Connection, grpc_message, text_field
from benchmarks.attack.target import ATTACKER_HOST, Attack, Progress, Target

_SERVICE = "/img2img.v1.Img2ImgService/"
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_SETTLE_SECONDS = 1.0


async def _hold(
    target: Target,
    progress: Progress,
    method: str,
    message: bytes,
    *,
    key: str = "",
    source: str = ATTACKER_HOST,
    end: bool = False,
) -> None:
    """Sends a message and leaves the call open; calls again once the server ends it."""

    async def call() -> None:
        connection = await Connection.open(target.grpc_port, source=source)
        try:
            stream = await connection.call(method, key)
            await connection.send(stream, message, end=end)
            progress.outcomes["sent"] += 1
            await connection.until_ended(stream)
        finally:
            await connection.close()

    await repeat(progress, call)


async def hold_messages(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Opens calls of one method that each make the api hold a message.

    `whole`: whether the message is complete; otherwise its last byte is never sent.
    """
    text = text_field(1, sizes["bytes"])
    message = grpc_message(text if sizes["whole"] else text[:-1], announced=len(text))
    key = target.attacker if sizes["key"] else ""
    async with asyncio.TaskGroup() as group:
        for at in range(sizes["calls"]):
            source = f"127.0.1.{at % sizes['peers'] + 1}"
            group.create_task(
                _hold(
                    target,
                    progress,
                    sizes["method"],
                    message,
                    key=key,
                    source=source,
                    end=sizes["whole"],
                )
            )
        await asyncio.sleep(_SETTLE_SECONDS)
        progress.under_way()


async def large_requests(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Creates jobs with init images close to the limit of bytes, many at once."""
    image = images.noise(256) + bytes(sizes["bytes"])
    await create_jobs(target, progress, [spec(image)] * sizes["calls"])


async def streams_of_headers(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Opens as many calls as the server lets it, without sending a message."""

    async def open_calls(source: str) -> None:
        connection = await Connection.open(target.grpc_port, source=source)
        try:
            for _ in range(sizes["streams"]):
                await connection.call(_SERVICE + "CreateJob", target.attacker)
                progress.outcomes["opened"] += 1
            await connection.until_ended(0)
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for at in range(sizes["connections"]):
            source = f"127.0.1.{at % 200 + 1}"
            group.create_task(repeat(progress, lambda source=source: open_calls(source)))
        await asyncio.sleep(_SETTLE_SECONDS)
        progress.under_way()


def _held(
    name: str, title: str, method: str, short: Mapping[str, Any] | None = None, **sizes: Any
) -> Attack:
    parameters = {"method": method, "key": False, "whole": False, "peers": 1} | sizes
    return Attack(name, title, hold_messages, parameters, short)


ATTACKS = (
    _held(
        "F4-health-watch",
        "Health/Watch with service names of 20 MB, no key",
        _HEALTH + "Watch",
        calls=40,
        bytes=20_000_000,
        whole=True,
    ),
    _held(
        "F4-health-unfinished",
        "Health/Check of 33 MB without its last byte, no key",
        _HEALTH + "Check",
        {"calls": 8},
        calls=40,
        bytes=33_000_000,
    ),
    _held(
        "F4-reflection",
        "reflection with messages of 33 MB without the last byte, no key",
        _REFLECTION,
        calls=40,
        bytes=33_000_000,
    ),
    _held(
        "F4-reflection-whole",
        "reflection with symbols of 20 MB, no key, from 20 addresses",
        _REFLECTION,
        calls=40,
        bytes=20_000_000,
        whole=True,
        peers=20,
    ),
    _held(
        "F4-get-unfinished",
        "GetJob of 33 MB without its last byte",
        _SERVICE + "GetJob",
        calls=40,
        bytes=33_000_000,
        key=True,
    ),
    _held(
        "F4-create-unfinished",
        "CreateJob of 33 MB without its last byte, from 20 addresses",
        _SERVICE + "CreateJob",
        {"calls": 10},
        calls=60,
        bytes=33_000_000,
        key=True,
        peers=20,
    ),
    _held(
        "F4-list-whole",
        "ListJobs with page tokens of 20 MB",
        _SERVICE + "ListJobs",
        calls=40,
        bytes=20_000_000,
        key=True,
        whole=True,
    ),
    _held(
        "F4-no-key",
        "CreateJob of 33 MB with a wrong key",
        _SERVICE + "CreateJob",
        calls=40,
        bytes=33_000_000,
    ),
    Attack(
        "F4-create-20-mb",
        "CreateJob of 20 MB, many at once",
        large_requests,
        {"calls": 40, "bytes": 19_900_000},
    ),
    Attack(
        "F4-open-calls",
        "calls whose headers are all that arrives",
        streams_of_headers,
        {"connections": 20, "streams": 100},
    ),
)
