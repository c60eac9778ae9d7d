"""Serves a model of the full size of Stable Diffusion 1.5, with random weights, on a CPU.

Opt-in: it writes 4 GiB, and takes minutes. It starts `img2img-server local` with the model, without
a warm-up, and exits with 1 if one of these does not hold:

- The peak memory of the worker until it is ready is at most 1.15 x the weights + 800 MB.
- The progress of a request has every step, and heartbeats in between.
- A request that is cancelled ends after at most one more step.
- A worker that gets SIGTERM finishes its job in the first attempt before it ends.

    python -m benchmarks.full_size [--side 256] [--folder FOLDER] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.local_stack import LocalStack, local_stack
from benchmarks.overhead import KEY, PHOTO, hardware, milliseconds
from img2img.v1 import event_pb2, job_pb2, service_pb2, service_pb2_grpc

MOST_FACTOR, MOST_BYTES = 1.15, 800_000_000
DRAIN_SECONDS = 300.0
_STEPS, _CANCELLED_STEPS, _CANCEL_AFTER = 4, 50, 2


@dataclass
class Followed:
    """The stream of one request.

    Attributes:
        steps: Seconds after the start at which each step was finished.
    """

    started: float = 0.0
    steps: list[float] = field(default_factory=list)
    heartbeats: int = 0
    ended: float = 0.0
    job: job_pb2.Job = field(default_factory=job_pb2.Job)


def write_model(architecture: str, folder: Path) -> None:
    """Writes the model in a process of its own, which returns the memory."""
    process = multiprocessing.get_context("spawn").Process(
        target=_write_model, args=(architecture, folder)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the model was not written: exit code {process.exitcode}")


def _write_model(architecture: str, folder: Path) -> None:
    import torch

    from benchmarks.engine_architectures import build

    with tempfile.TemporaryDirectory() as words:
        pipeline = build(architecture, Path(words), torch.device("cpu"), torch.float32)
    pipeline.save_pretrained(folder, max_shard_size="10GB")


def weights_bytes(folder: Path) -> int:
    """Returns the size of all weights, which are float32 in the files too."""
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))


def worker_of(stack: LocalStack) -> psutil.Process:
    """Returns the worker's process."""
    for process in psutil.Process(stack.pid).children(recursive=True):
        if "worker" in process.cmdline():
            return process
    raise RuntimeError("there is no worker")


def peak_bytes(process: psutil.Process) -> int:
    """Returns the largest resident memory that a process had, the pages of files included."""
    for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not report the peak")


async def follow(
    stub: service_pb2_grpc.Img2ImgServiceStub,
    side: int,
    steps: int,
    *,
    cancel_after: int = 0,
    on_first_step: Any = None,
) -> Followed:
    """Sends a request and reads its stream to the end."""
    spec = job_pb2.JobSpec(
        prompt="an oil painting of a cat",
        init_image=job_pb2.InitImage(data=PHOTO.read_bytes()),
        width=side,
        height=side,
        strength=1.0,
        num_inference_steps=steps,
        guidance_scale=1.0,
        safety_checker=False,
    )
    found, began = Followed(), time.perf_counter()
    async for message in stub.Generate(service_pb2.GenerateRequest(spec=spec), metadata=KEY):
        event: event_pb2.JobEvent = message.event
        now = time.perf_counter() - began
        match event.WhichOneof("event"):
            case "heartbeat":
                found.heartbeats += 1
            case "started":
                found.started = now
            case "step":
                found.steps.append(now)
                if len(found.steps) == cancel_after:
                    await stub.CancelJob(service_pb2.CancelJobRequest(name=event.job), metadata=KEY)
                if len(found.steps) == 1 and on_first_step:
                    on_first_step()
            case "succeeded":
                found.job, found.ended = event.succeeded.job, now
            case "cancelled":
                found.job, found.ended = event.cancelled.job, now
            case "failed":
                raise RuntimeError(f"the request failed: {event.failed}")
    return found


async def measure(folder: Path, side: int) -> dict[str, Any]:
    """Returns the report."""
    weights = weights_bytes(folder)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as state:
        async with local_stack(
            Path(state),
            IMG2IMG_MODEL=str(folder),
            IMG2IMG_DEVICE="cpu",
            IMG2IMG_WARM_UP_SIZES="",
            IMG2IMG_HEARTBEAT_SECONDS="0.5",
            IMG2IMG_DRAIN_SECONDS=str(DRAIN_SECONDS),
        ) as stack:
            ready = time.perf_counter() - began
            worker = worker_of(stack)
            peak = peak_bytes(worker)
            async with grpc.aio.insecure_channel(stack.grpc_address) as channel:
                stub = service_pb2_grpc.Img2ImgServiceStub(channel)
                whole = await follow(stub, side, _STEPS)
                again = await follow(stub, side, _STEPS)
                cancelled = await follow(stub, side, _CANCELLED_STEPS, cancel_after=_CANCEL_AFTER)
                after_jobs = peak_bytes(worker)
                signalled = list[float]()

                def stop_worker() -> None:
                    signalled.append(time.perf_counter())
                    os.kill(worker.pid, signal.SIGTERM)

                drained = await follow(stub, side, _STEPS, on_first_step=stop_worker)
                await asyncio.to_thread(worker.wait, DRAIN_SECONDS)
                drain = time.perf_counter() - signalled[0]
    gaps = [after - before for before, after in zip(again.steps, again.steps[1:], strict=False)]
    return {
        "what": f"a model of the full size of SD 1.5 at {side}x{side}, without guidance, on a CPU",
        "hardware": hardware(),
        "weights_bytes": weights,
        "limit_bytes": int(MOST_FACTOR * weights + MOST_BYTES),
        "peak_until_ready_bytes": peak,
        "peak_after_jobs_bytes": after_jobs,
        "ready_seconds": round(ready, 1),
        "first_step_seconds": round(whole.steps[0] - whole.started, 2),
        "step_seconds": round(sorted(gaps)[len(gaps) // 2], 2),
        "first_decode_seconds": round(milliseconds(whole.job.timings.decode) / 1e3, 2),
        "decode_seconds": round(milliseconds(again.job.timings.decode) / 1e3, 2),
        "steps_reported": len(whole.steps),
        "heartbeats": whole.heartbeats + again.heartbeats,
        "cancelled": cancelled.job.state == job_pb2.Job.STATE_CANCELLED,
        "steps_after_cancel": len(cancelled.steps) - _CANCEL_AFTER,
        "seconds_from_last_step_before_cancel_to_end": round(
            cancelled.ended - cancelled.steps[_CANCEL_AFTER - 1], 2
        ),
        "drained_job_succeeded": drained.job.state == job_pb2.Job.STATE_SUCCEEDED,
        "drained_job_attempt": drained.job.attempt,
        "drain_seconds": round(drain, 2),
    }


def misses(report: dict[str, Any]) -> list[str]:
    """Returns the names of the checks that do not hold."""
    checks = {
        "memory": report["peak_until_ready_bytes"] <= report["limit_bytes"],
        "progress": report["steps_reported"] == _STEPS,
        "heartbeats": report["heartbeats"] > 0,
        "cancel": report["cancelled"] and report["steps_after_cancel"] <= 1,
        "drain": report["drained_job_succeeded"] and report["drained_job_attempt"] == 1,
    }
    return [name for name, holds in checks.items() if not holds]


def main() -> None:
    """Runs the benchmark, prints and writes JSON; exits with 1 if a check does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=("sd15", "toy"), default="sd15")
    parser.add_argument("--folder", type=Path, help="keep the model here")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not (folder / "model_index.json").exists():
            write_model(arguments.architecture, folder)
        report = asyncio.run(measure(folder, arguments.side))
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    missed = misses(report)
    print("does not hold: " + ", ".join(missed) if missed else "all checks hold")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
