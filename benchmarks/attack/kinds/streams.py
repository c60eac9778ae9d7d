"""F6 and F9: many event streams, slow readers of them, and streams of other tenants' jobs."""

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

_WATCH = "/img2img.v1.Img2ImgService/WatchJob"
_SETTLE_SECONDS = 1.0


def large_spec() -> job_pb2.JobSpec:
    """Returns a request whose events have 12 MB: four images that do not compress."""
    return spec(
        images.noise(1024),
        width=1024,
        height=1024,
        samples=4,
        strength=0.0,
        output_format=job_pb2.IMAGE_FORMAT_PNG,
    )


async def finished_job(target: Target, tenant: str, request: job_pb2.JobSpec) -> str:
    """Runs a job to its end and returns its name."""
    name = ""
    async with stub_of(target) as stub:
        generate = service_pb2.GenerateRequest(spec=request)
        metadata = target.metadata(tenant)
        async for message in stub.Generate(generate, metadata=metadata, timeout=SECONDS):
            name = message.event.snapshot.job.name or name
    return name


async def honest_readers(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Watches a job with 12 MB of events again and again, in many streams at a time."""
    name = await finished_job(target, "attacker-1", large_spec())
    await _watch_again(target, progress, name, sizes["readers"])


async def slow_readers(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Watches a job with 12 MB of events in streams that read the first bytes only."""
    name = await finished_job(target, "attacker-1", large_spec())
    message = grpc_message(service_pb2.WatchJobRequest(name=name).SerializeToString())

    async def watch() -> None:
        connection = await Connection.open(target.grpc_port, reads=False)
        try:
            stream = await connection.call(_WATCH, target.attacker)
            await connection.send(stream, message, end=True)
            await connection.until_ended(stream)
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(sizes["readers"]):
            group.create_task(repeat(progress, watch))
        await asyncio.sleep(_SETTLE_SECONDS)
        progress.under_way()


async def foreign_jobs(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Watches a job of another tenant, which is answered with NOT_FOUND, again and again."""
    name = await finished_job(target, "attacker-2", large_spec())
    await _watch_again(target, progress, name, sizes["calls"])


async def _watch_again(target: Target, progress: Progress, name: str, streams: int) -> None:
    """Watches a job with the key of attacker-1 in as many streams at a time."""
    request, metadata = service_pb2.WatchJobRequest(name=name), target.metadata("attacker-1")
    async with stub_of(target) as stub:

        async def watch() -> None:
            async for _ in stub.WatchJob(request, metadata=metadata, timeout=SECONDS):
                pass

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(repeat(progress, watch))
            progress.under_way()


async def all_streams(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Holds as many streams as two tenants may open, on jobs that do not end."""

    async def hold(tenant: str) -> None:
        metadata = target.metadata(tenant)
        async with stub_of(target) as stub, asyncio.TaskGroup() as group:
            create = service_pb2.CreateJobRequest(
                spec=spec(images.plain(64, "JPEG"), prompt="hold:")
            )
            created = await stub.CreateJob(create, metadata=metadata, timeout=SECONDS)
            request = service_pb2.WatchJobRequest(name=created.job.name)

            async def watch() -> None:
                async for _ in stub.WatchJob(request, metadata=metadata):
                    pass

            for _ in range(sizes["streams"]):
                group.create_task(repeat(progress, watch))
            await asyncio.sleep(2 * _SETTLE_SECONDS)

    async with asyncio.TaskGroup() as group:
        for tenant in ("attacker-1", "attacker-2"):
            group.create_task(hold(tenant))
        await asyncio.sleep(4 * _SETTLE_SECONDS)
        progress.under_way()


async def abandoned_streams(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Opens Generate calls and breaks them at once, again and again."""
    request = service_pb2.GenerateRequest(spec=spec(images.plain(64, "JPEG")))
    metadata = target.metadata("attacker-1")

    async def generate() -> None:
        async with grpc.aio.insecure_channel(target.grpc_address) as channel:
            call = channel.unary_stream(
                "/img2img.v1.Img2ImgService/Generate",
                request_serializer=service_pb2.GenerateRequest.SerializeToString,
                response_deserializer=service_pb2.GenerateResponse.FromString,
            )(request, metadata=metadata, timeout=SECONDS)
            await call.read()
            call.cancel()

    async with asyncio.TaskGroup() as group:
        for _ in range(sizes["calls"]):
            group.create_task(repeat(progress, generate))
        progress.under_way()


ATTACKS = (
    Attack(
        "F6-honest-readers",
        "many readers of one job with 12 MB of events",
        honest_readers,
        {"readers": 60},
    ),
    Attack(
        "F6-slow-readers",
        "readers that stop reading a job with 12 MB of events",
        slow_readers,
        {"readers": 300},
        {"readers": 60},
    ),
    Attack(
        "F6-foreign-jobs",
        "WatchJob of another tenant's job with 12 MB of events",
        foreign_jobs,
        {"calls": 300},
    ),
    Attack(
        "F6-abandoned-streams",
        "Generate calls that break at once",
        abandoned_streams,
        {"calls": 20},
    ),
    Attack(
        "F9-all-streams",
        "two tenants hold as many event streams as each may open",
        all_streams,
        {"streams": 500},
        {},
    ),
)
