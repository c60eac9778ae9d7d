"""Measures the memory of an engine on the CPU over thousands of jobs with the model that ships.

The jobs have small images of several sizes, all samplers and different prompts, and some are
cancelled. Exits with 1 when resident memory grows by 20 MB or more after the warm-up.

    python -m benchmarks.engine_memory [--jobs 2000] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from pathlib import Path

import psutil
import torch

from benchmarks.engine import hardware
from benchmarks.engine_stock import photo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.engine.base import EngineEvent, EngineJob, JobDone, JobFailed, JobStopped
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.samplers import DIFFUSION_SAMPLERS
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.malloc import keep_freed_memory

BOUND_BYTES = 20_000_000
# These jobs fill the caches of prompts (128) and schedules, and those of the allocator.
WARM_UP_JOBS, WAVE = 400, 20
_SIDES = (32, 48, 64)


def job(number: int) -> EngineJob:
    """Returns a job; each one differs from the one before."""
    params = JobParams(
        prompt=f"image {number}",
        negative_prompt=f"not {number}" if number % 4 == 0 else "",
        strength=(0.5, 0.75, 1.0)[number % 3],
        seed=number,
        samples=2 if number % 7 == 0 else 1,
        num_inference_steps=2,
        guidance_scale=4.0 if number % 2 else 1.0,
        scheduler=DIFFUSION_SAMPLERS[number % len(DIFFUSION_SAMPLERS)],
        preview_interval_steps=number % 2,
        lane=Lane.BATCH if number % 5 == 0 else Lane.REALTIME,
    )
    return EngineJob(
        job_id=number,
        tenant=f"tenant {number % 3}",
        params=params,
        init_image=photo(_SIDES[number % len(_SIDES)]),
    )


def run_wave(engine: DiffusionEngine, first: int) -> None:
    """Runs some jobs at once and cancels one of them."""
    ends: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()

    def sink(event: EngineEvent) -> None:
        if isinstance(event, JobDone | JobStopped | JobFailed):
            ends.put(event)

    for number in range(first, first + WAVE):
        engine.submit(job(number), sink)
    engine.cancel(first + WAVE - 1)
    for _ in range(WAVE):
        event = ends.get()
        if isinstance(event, JobFailed):
            raise event.error


def measure(jobs: int) -> dict[str, object]:
    """Returns the report: memory in bytes after the warm-up, at the end, and the maximum."""
    spec = read_model_spec("")
    device, dtype = torch.device("cpu"), torch.float32
    keep_freed_memory()  # as worker processes do
    engine = DiffusionEngine(DiffusersDenoiser.load(spec.source, device, dtype), spec, 8)
    process = psutil.Process()
    try:
        for first in range(0, WARM_UP_JOBS, WAVE):
            run_wave(engine, first)
        began, before = time.perf_counter(), process.memory_info().rss
        seen = []
        for first in range(WARM_UP_JOBS, WARM_UP_JOBS + jobs, WAVE):
            run_wave(engine, first)
            seen.append(process.memory_info().rss)
    finally:
        engine.stop()
    return {
        "what": "resident memory of one engine, the model that ships, images of 32 to 64 pixels",
        "warm_up_jobs": WARM_UP_JOBS,
        "jobs": len(seen) * WAVE,
        "seconds": round(time.perf_counter() - began, 1),
        "rss_after_warm_up": before,
        "rss_at_the_end": seen[-1],
        "growth": seen[-1] - before,
        "largest_growth": max(seen) - before,
        "hardware": hardware(device, dtype),
    }


def main() -> None:
    """Runs the jobs, prints and writes JSON; returns 1 if memory grew too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments.jobs)
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    growth = report["growth"]
    assert isinstance(growth, int)
    sys.exit(growth >= BOUND_BYTES)


if __name__ == "__main__":
    main()
