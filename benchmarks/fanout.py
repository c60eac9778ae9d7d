"""Measures event streams: many watchers of running jobs on one api, next to a bare gRPC fan-out.

    python -m benchmarks.fanout            steady, burst and large
    python -m benchmarks.fanout steady     p99 of the delay, in pairs with a bare grpc.aio server
    python -m benchmarks.fanout burst      all watchers call within 2 s while events are sent
    python -m benchmarks.fanout large      60 of the watchers follow a job with 12 MB of events

Each server is a process of its own, and all watchers are in this process. The api is the real one
with a real NATS server; a process appends the events of 8 running jobs of two tenants, as a worker
does. The bare server is grpc.aio with a queue for each stream and sends equal messages at the same
rate. The delay of an event is the time from its `event_time` to its arrival. Run by `make fanout`;
the exit status is 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import psutil

from img2img.v1 import event_pb2, service_pb2
from img2img_server.api import convert
from img2img_server.api.keys import new_key
from img2img_server.api.server import serve_api
from img2img_server.devstack.nats import nats_server, nats_url
from img2img_server.domain.events import (
    EncodedImage,
    Envelope,
    Queued,
    SampleFinished,
    Started,
    StepFinished,
    Succeeded,
)
from img2img_server.domain.job import Job, State
from img2img_server.domain.params import JobParams
from img2img_server.interfaces.queue import EventWriter
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.ports import free_ports
from img2img_server.settings import Settings
from img2img_server.telemetry import configure_logging

TENANTS: Final = ("alpha", "beta")
JOBS, CHANNELS = 8, 8
WATCH, GET = "/img2img.v1.Img2ImgService/WatchJob", "/img2img.v1.Img2ImgService/GetJob"
BARE = "/bare.Fanout/Watch"
P99_RATIO: Final = 1.5
NATS_BYTES: Final = 400 * 2**20  # resident memory of NATS in the round with large events
API_BYTES: Final = 800 * 2**20
STEP = StepFinished(sample=0, step=1, total=1000, sigma=1.5)


@dataclass(frozen=True)
class Load:
    """The load of one round. `rate`: messages a second to all watchers together."""

    watchers: int = 1000
    rate: float = 500.0
    seconds: float = 20.0
    opening_seconds: float = 15.0


@dataclass
class Watched:
    """One stream: arrivals of its messages, and how it ended."""

    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    code: str = "OPEN"

    def events(self) -> list[tuple[float, event_pb2.JobEvent]]:
        """Returns the events of the log with the times of their arrival."""
        parsed = ((at, service_pb2.WatchJobResponse.FromString(d).event) for at, d in self.arrivals)
        other = ("snapshot", "heartbeat")
        return [(at, event) for at, event in parsed if event.WhichOneof("event") not in other]


class Watchers:
    """Streams of this process. Messages are kept undecoded and read after the round."""

    def __init__(self, address: str, method: str) -> None:
        self._address = address
        self._method = method
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: list[Watched] = []
        self.channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Watchers:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        for _ in range(CHANNELS):
            self.channels.append(grpc.aio.insecure_channel(self._address, options=options))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self.channels:
            await channel.close()

    def open(self, request: bytes, key: str) -> Watched:
        """Opens one stream."""
        stream = Watched()
        channel = self.channels[len(self.streams) % CHANNELS]
        self.streams.append(stream)
        self._tasks.append(asyncio.create_task(self._read(channel, request, key, stream)))
        return stream

    async def _read(
        self, channel: grpc.aio.Channel, request: bytes, key: str, stream: Watched
    ) -> None:
        metadata = (("authorization", f"Bearer {key}"),)
        call = channel.unary_stream(self._method)(request, metadata=metadata)
        try:
            async for data in call:
                stream.arrivals.append((time.time(), data))
            stream.code = "OK"
        except grpc.aio.AioRpcError as error:
            stream.code = error.code().name

    async def ended(self, seconds: float) -> None:
        """Waits until all streams have ended."""
        await asyncio.wait(self._tasks, timeout=seconds)

    async def all_have(self, messages: int, seconds: float) -> bool:
        """Waits until every stream has that many messages."""
        try:
            async with asyncio.timeout(seconds):
                # A look now and then costs less than an event for each message.
                while any(len(s.arrivals) < messages for s in self.streams):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def server(kind: str, config: dict[str, Any]) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Starts a server in a process of its own. Yields its address and process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.fanout",
        f"serve-{kind}",
        json.dumps(config),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().strip()
        if not address:
            raise SystemExit(f"the {kind} server did not start")
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        await process.wait()


async def serve_bare(config: dict[str, Any]) -> None:
    """Serves a fan-out by grpc.aio alone: a queue for each stream and the same messages."""
    topics: dict[bytes, set[asyncio.Queue[bytes]]] = {}

    async def watch(request: bytes, _: Any) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        topics.setdefault(request, set()).add(queue)
        try:
            yield b""
            while True:
                yield await queue.get()
        finally:
            topics[request].discard(queue)

    running = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(watch)
    service, method = BARE.strip("/").split("/")
    running.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    print(f"127.0.0.1:{port}", flush=True)
    pause = 1.0 / config["events_per_second"]
    sequence, due = 0, time.monotonic()
    while True:
        for number in range(JOBS):
            due += pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sequence += 1
            envelope = Envelope(
                sequence=sequence, time=time.time(), job_id=10_000_001 + number, event=STEP
            )
            data = service_pb2.WatchJobResponse(event=convert.event(envelope)).SerializeToString()
            for queue in topics.get(str(number).encode(), ()):
                queue.put_nowait(data)


@dataclass
class Service:
    """A running api with NATS, and the records of running jobs."""

    bus: Bus
    address: str
    api: psutil.Process
    nats: psutil.Process
    keys: dict[str, str]
    config: dict[str, Any]
    jobs: list[Job] = field(default_factory=list)
    writers: list[EventWriter] = field(default_factory=list)

    async def add_job(self, tenant: str) -> EventWriter:
        """Stores the record and the first events of a running job."""
        job = Job(
            id=await self.bus.jobs.next_id(tenant),
            tenant=tenant,
            params=JobParams(prompt="a cat", model="fake"),
            file_prefix="benchmark",
            future_urls=("http://127.0.0.1/image.png",),
            create_time=time.time(),
            start_time=time.time(),
            state=State.RUNNING,
            attempt=1,
        )
        await self.bus.jobs.create(job)
        writer = await self.bus.events.open(job.id, fresh=True)
        await writer.append(Queued(position=0))
        await writer.append(Started(worker="w", model="fake", attempt=1))
        self.jobs.append(job)
        self.writers.append(writer)
        return writer

    def watch(self, watchers: Watchers, number: int) -> Watched:
        """Opens a stream of the job with this number."""
        job = self.jobs[number % len(self.jobs)]
        request = service_pb2.WatchJobRequest(name=job.name).SerializeToString()
        return watchers.open(request, self.keys[job.tenant])

    @asynccontextmanager
    async def appending(self, rate: float) -> AsyncIterator[None]:
        """Appends steps to the jobs in turn, `rate` a second, in a process of its own."""
        logs = [[job.id, job.tenant] for job in self.jobs]
        async with server("events", {**self.config, "logs": logs, "rate": rate}):
            yield
        for number, job in enumerate(self.jobs):
            self.writers[number] = await self.bus.events.open(job.id, tenant=job.tenant)


async def serve_events(config: dict[str, Any]) -> None:
    """Appends events until it is terminated, as a worker does."""
    logs, rate = config.pop("logs"), config.pop("rate")
    async with connect_bus(Settings(**config)) as bus:
        writers = [await bus.events.open(job_id, tenant=tenant) for job_id, tenant in logs]
        print("started", flush=True)
        count, due = 0, time.monotonic()
        while True:
            due += 1.0 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await writers[count % len(writers)].append(STEP)
            count += 1


@asynccontextmanager
async def service(folder: Path, **changes: Any) -> AsyncIterator[Service]:
    """Starts NATS and an api with two tenants."""
    (folder / "nats").mkdir(parents=True)
    keys, entries = {}, []
    for tenant in TENANTS:
        keys[tenant], entry = new_key(tenant, [])
        entries.append(entry)
    (folder / "keys.toml").write_text("\n".join(entries))
    port = free_ports(1)[0]
    nats = nats_server(folder / "nats", port, "fanout")
    await nats.start()
    config = {
        "nats_url": nats_url(port, "fanout"),
        "grpc_port": 0,
        "metrics_port": 0,
        "api_keys_file": str(folder / "keys.toml"),
        "log_level": "error",
        **changes,
    }
    try:
        async with server("api", config) as (address, api), connect_bus(Settings(**config)) as bus:
            assert nats.pid is not None
            yield Service(bus, address, api, psutil.Process(nats.pid), keys, config)
    finally:
        await nats.stop()


async def serve_the_api(config: dict[str, Any]) -> None:
    """Serves the api until it is terminated."""

    def started(address: str) -> None:
        print(address, flush=True)

    configure_logging(Settings(**config), "api")
    await serve_api(Settings(**config), asyncio.Event(), started)


def delays(streams: Sequence[Watched], since: float) -> list[float]:
    """Returns the milliseconds from event_time to arrival of the steps after a time."""
    found = []
    for stream in streams:
        for at, event in stream.events():
            happened = event.event_time.ToNanoseconds() / 1e9
            if happened >= since and event.WhichOneof("event") == "step":
                found.append(1000 * (at - happened))
    return found


def percentiles(values: list[float], cpu: float) -> dict[str, float]:
    """Summarises delays. `cpu`: the seconds of CPU that the server used for these messages."""
    ranks = statistics.quantiles(values, n=100)
    return {
        "p50": round(ranks[49], 1),
        "p99": round(ranks[98], 1),
        "messages": len(values),
        "cpu_us": round(1e6 * cpu / len(values)),
    }


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def measure_bare(load: Load) -> dict[str, float]:
    """Returns the delays of the bare fan-out."""
    config = {"events_per_second": load.rate * JOBS / load.watchers}
    async with server("bare", config) as (address, bare), Watchers(address, BARE) as watchers:
        for number in range(load.watchers):
            watchers.open(str(number % JOBS).encode(), "none")
            await asyncio.sleep(load.opening_seconds / load.watchers)
        await watchers.all_have(1, 60.0)
        since, cpu = time.time(), cpu_seconds(bare)
        await asyncio.sleep(load.seconds)
        cpu = cpu_seconds(bare) - cpu
        for stream in watchers.streams:
            stream.arrivals = stream.arrivals[1:]
        return percentiles(delays(watchers.streams, since), cpu)


async def measure_service(folder: Path, load: Load) -> dict[str, Any]:
    """Returns the delays of the service, the slowest new call, and how streams ended."""
    async with service(folder) as running, Watchers(running.address, WATCH) as watchers:
        for number in range(JOBS):
            await running.add_job(TENANTS[number % len(TENANTS)])
        async with running.appending(load.rate * JOBS / load.watchers):
            for number in range(load.watchers):
                running.watch(watchers, number)
                await asyncio.sleep(load.opening_seconds / load.watchers)
            began = time.monotonic()
            opened = await watchers.all_have(1, 60.0)
            opening = time.monotonic() - began
            since, ends_at = time.time(), time.monotonic() + load.seconds
            cpu = cpu_seconds(running.api)
            calls = [await new_call(running)]
            while time.monotonic() < ends_at:
                await asyncio.sleep(0.25)
                calls.append(await new_call(running))
            cpu = cpu_seconds(running.api) - cpu
        for writer in running.writers:
            await writer.append(Succeeded())
        await watchers.ended(60.0)
        codes = [stream.code for stream in watchers.streams]
        return percentiles(delays(watchers.streams, since), cpu) | {
            "opened": opened,
            "last_open_s": round(opening, 1),
            "slowest_call_ms": round(max(calls), 1),
            "codes": {code: codes.count(code) for code in sorted(set(codes))},
            "complete": sum(is_complete(s, w.sequence) for s, w in pairs(watchers, running)),
        }


async def new_call(running: Service) -> float:
    """Returns the milliseconds of a call on a new connection."""
    job = running.jobs[0]
    began = time.monotonic()
    async with grpc.aio.insecure_channel(
        running.address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        request = service_pb2.GetJobRequest(name=job.name).SerializeToString()
        metadata = (("authorization", f"Bearer {running.keys[job.tenant]}"),)
        await channel.unary_unary(GET)(request, metadata=metadata, timeout=30.0)
    return 1000 * (time.monotonic() - began)


def pairs(watchers: Watchers, running: Service) -> list[tuple[Watched, EventWriter]]:
    """Returns each stream with the writer of its log."""
    writers = running.writers
    return [(s, writers[n % len(writers)]) for n, s in enumerate(watchers.streams)]


def is_complete(stream: Watched, last: int) -> bool:
    """Returns whether the stream had every event once and in order."""
    return [event.sequence for _, event in stream.events()] == list(range(1, last + 1))


async def measure_large(
    folder: Path, *, watchers: int = 1000, heavy: int = 60, events: int = 42, size: int = 300_000
) -> dict[str, Any]:
    """Watches jobs of two tenants, some of them a job with large events.

    Returns the number of complete streams and the peaks of memory.
    """
    peaks = {"nats": 0, "api": 0}
    async with service(folder) as running, Watchers(running.address, WATCH) as clients:
        first = await running.add_job(TENANTS[0])
        image = EncodedImage(
            data=b"\0" * size, media_type="image/png", sha256="a" * 64, width=8, height=8
        )
        for _ in range(events // 2):
            await first.append(SampleFinished(sample=0, seed=1, image=image))
        for number in range(1, JOBS):
            await running.add_job(TENANTS[number % len(TENANTS)])
        # Half of the streams for each tenant: the limit of a tenant is half of all.
        beta = [1 + 2 * (number % (JOBS // 2)) for number in range(watchers // 2)]
        alpha = [2 + 2 * (number % (JOBS // 2 - 1)) for number in range(watchers - watchers // 2)]
        plan = [0] * heavy + alpha[heavy:] + beta
        before = running.nats.memory_info().rss

        async def observe() -> None:
            while True:
                for name, process in (("nats", running.nats), ("api", running.api)):
                    peaks[name] = max(peaks[name], process.memory_info().rss)
                await asyncio.sleep(0.1)

        observing = asyncio.create_task(observe())
        for number in plan:
            running.watch(clients, number)
            await asyncio.sleep(0.002)
        for _ in range(events - events // 2):
            await first.append(SampleFinished(sample=0, seed=1, image=image))
        await clients.all_have(3, 60.0)
        for writer in running.writers:
            for _ in range(5):
                await writer.append(STEP)
            await writer.append(Succeeded())
        await clients.ended(240.0)
        observing.cancel()
        codes = [stream.code for stream in clients.streams]
        complete = [
            is_complete(stream, running.writers[number].sequence)
            for stream, number in zip(clients.streams, plan, strict=True)
        ]
        return {
            "complete": sum(complete),
            "of": watchers,
            "heavy_complete": sum(complete[:heavy]),
            "codes": {code: codes.count(code) for code in sorted(set(codes))},
            "nats_mb": {
                "before": round(before / 2**20),
                "peak": round(peaks["nats"] / 2**20),
            },
            "api_mb": {"peak": round(peaks["api"] / 2**20)},
        }


def check(sentences: dict[str, bool]) -> bool:
    for sentence, holds in sentences.items():
        print(f"{'ok  ' if holds else 'FAIL'} {sentence}")
    return all(sentences.values())


async def steady(load: Load, rounds: int) -> bool:
    """Measures pairs of rounds: bare, then service."""
    ratios, holds = [], True
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            bare = await measure_bare(load)
            found = await measure_service(Path(folder) / str(number), load)
            ratios.append(found["p99"] / bare["p99"])
            print(json.dumps({"bare": bare, "service": found, "p99_ratio": round(ratios[-1], 2)}))
            holds &= check(
                {
                    "every stream ended with OK": set(found["codes"]) == {"OK"},
                    "every stream had every event": found["complete"] == load.watchers,
                }
            )
    median = statistics.median(ratios)
    return holds & check({f"p99 is {median:.2f} of the bare fan-out's": median <= P99_RATIO})


async def burst(load: Load) -> bool:
    """Opens all streams at once while events are sent."""
    with tempfile.TemporaryDirectory() as folder:
        found = await measure_service(Path(folder) / "burst", load)
    print(json.dumps({"burst": found}))
    return check(
        {
            "no call ended with an error": set(found["codes"]) == {"OK"},
            "every stream had every event": found["complete"] == load.watchers,
        }
    )


async def large(watchers: int) -> bool:
    """Lets 60 watchers follow a job with 12 MB of events."""
    with tempfile.TemporaryDirectory() as folder:
        found = await measure_large(Path(folder) / "large", watchers=watchers)
    print(json.dumps({"large": found}))
    return check(
        {
            "every stream had every event": found["complete"] == watchers,
            "NATS stays below its bound": found["nats_mb"]["peak"] * 2**20 < NATS_BYTES,
            "the api stays below its bound": found["api_mb"]["peak"] * 2**20 < API_BYTES,
        }
    )


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=["steady", "burst", "large"])
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=500.0, help="messages a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = Load(watchers=options.watchers, rate=options.rate, seconds=options.seconds)
    fast = Load(watchers=options.watchers, rate=2000.0, seconds=10.0, opening_seconds=2.0)
    gc.disable()  # a pause of this process is no delay of the server
    holds = True
    if "steady" in options.kinds:
        holds &= await steady(load, options.rounds)
    if "burst" in options.kinds:
        holds &= await burst(fast)
    if "large" in options.kinds:
        holds &= await large(options.watchers)
    return 0 if holds else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve-api"]:
        asyncio.run(serve_the_api(json.loads(sys.argv[2])))
    elif sys.argv[1:2] == ["serve-events"]:
        asyncio.run(serve_events(json.loads(sys.argv[2])))
    elif sys.argv[1:2] == ["serve-bare"]:
        asyncio.run(serve_bare(json.loads(sys.argv[2])))
    else:
        sys.exit(asyncio.run(main()))
