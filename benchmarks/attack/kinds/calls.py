"""F12, F13, F14: floods of small calls that are cheap to make."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc

from benchmarks.attack import images
from benchmarks.attack.callers import SECONDS, repeat, spec, stub_of
from benchmarks.attack.http2 import Connection, grpc_message
from benchmarks.attack.target import Attack, Progress, Target
from img2img.v1 import job_pb2, service_pb2


async def list_jobs(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Lists jobs in a state that none has, so that every record is read."""
    metadata = target.metadata("attacker-1")
    create = service_pb2.CreateJobRequest(spec=spec(images.plain(64, "JPEG")))
    request = service_pb2.ListJobsRequest(page_size=100, states=[job_pb2.Job.STATE_FAILED])
    async with stub_of(target) as stub:
        made = 0
        while made < sizes["jobs"]:
            try:
                await stub.CreateJob(create, metadata=metadata, timeout=SECONDS)
                made += 1
            except grpc.aio.AioRpcError:  # The queue is full.
                await asyncio.sleep(0.05)

        async def listing() -> None:
            await stub.ListJobs(request, metadata=metadata, timeout=SECONDS)

        async with asyncio.TaskGroup() as group:
            for _ in range(sizes["calls"]):
                group.create_task(repeat(progress, listing))
            progress.under_way()


async def unreadable_messages(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Sends messages that are no protobuf, with and without a key."""
    message = grpc_message(b"\x76")

    async def send(key: str) -> None:
        connection = await Connection.open(target.grpc_port)
        try:
            for _ in range(50):
                stream = await connection.call("/img2img.v1.Img2ImgService/GetJob", key)
                await connection.send(stream, message, end=True)
                await connection.until_ended(stream)
                progress.outcomes["ended"] += 1
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for at in range(sizes["connections"]):
            key = target.attacker if at % 2 else ""
            group.create_task(repeat(progress, lambda key=key: send(key)))
        progress.under_way()


async def reflection(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Asks reflection for everything, without a key, on streams that stay open."""
    listing = grpc_message(bytes([7 << 3 | 2, 1]) + b"*")  # list_services

    async def ask() -> None:
        connection = await Connection.open(target.grpc_port)
        try:
            stream = await connection.call(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            )
            for _ in range(sizes["questions"]):
                await connection.send(stream, listing)
            progress.outcomes["asked"] += sizes["questions"]
            async with asyncio.timeout(5):
                await connection.until_ended(stream)
        except TimeoutError:
            pass
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(sizes["connections"]):
            group.create_task(repeat(progress, ask))
        progress.under_way()


ATTACKS = (
    Attack(
        "F14-list-jobs",
        "ListJobs with a state that no job has, many at once",
        list_jobs,
        {"jobs": 300, "calls": 100},
    ),
    Attack(
        "F12-unreadable",
        "messages that are no protobuf",
        unreadable_messages,
        {"connections": 20},
    ),
    Attack(
        "F14-reflection",
        "questions to reflection without a key, on many streams",
        reflection,
        {"connections": 50, "questions": 1000},
    ),
)
