"""Compares one worker with the real small model under a mixed load with that of another commit.

    python -m benchmarks.fleet.mixed [--baseline COMMIT] [--pairs 2] [--jobs 24]

Both run the same load in turns: short and long jobs of one tenant that arrive at random times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import structlog

from benchmarks.fleet.baseline import checked_out
from img2img.v1 import job_pb2, service_pb2
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions
from img2img_server.settings import Settings
from img2img_server.testing.bus import memory_bus
from tests.stack import DEV, photo, running_api, running_worker, settings

SHORT_STEPS, LONG_STEPS = 2, 12
SECONDS_BETWEEN = 0.5


async def load(jobs: int, seed: int) -> dict[str, float]:
    """Returns jobs a second and the 95th percentile of the latency of short jobs, in seconds."""
    rng = random.Random(seed)
    engine = load_engine(EngineOptions.of(Settings()))
    bus = memory_bus(queue_limit=2 * jobs)
    config = settings(queue_limit=2 * jobs, default_model=engine.model.name)
    image = photo(256, 256)
    async with running_worker(bus, engine, config=config), running_api(bus, config) as api:

        async def one(number: int, steps: int, arrival: float) -> tuple[int, float]:
            await asyncio.sleep(arrival)
            spec = job_pb2.JobSpec(
                prompt="a harbour",
                init_image=job_pb2.InitImage(data=image),
                width=256,
                height=256,
                strength=1.0,
                num_inference_steps=steps,
                seed=number,
            )
            began = time.monotonic()
            call = api.stub.Generate(service_pb2.GenerateRequest(spec=spec), metadata=DEV)
            messages = [message async for message in call]
            assert messages[-1].event.HasField("succeeded")
            return steps, time.monotonic() - began

        await one(0, 1, 0.0)
        began, arrival, drawn = time.monotonic(), 0.0, []
        for number in range(jobs):
            steps = rng.choice((SHORT_STEPS, SHORT_STEPS, LONG_STEPS))
            drawn.append(one(number, steps, arrival))
            arrival += rng.expovariate(1 / SECONDS_BETWEEN)
        done = await asyncio.gather(*drawn)
        took = time.monotonic() - began
    short = sorted(seconds for steps, seconds in done if steps == SHORT_STEPS)
    return {
        "jobs_a_second": jobs / took,
        "short_median": statistics.median(short),
        "short_p95": short[int(0.95 * len(short))],
        "mean": statistics.mean(seconds for _, seconds in done),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", default="", help="a commit to compare with")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=-1, help="run one load here and print JSON")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if options.seed >= 0:
        print(json.dumps(asyncio.run(load(options.jobs, options.seed))))
        return 0

    def measure(seed: int, **where: Any) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.fleet.mixed"]
        command += ["--seed", str(seed), "--jobs", str(options.jobs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, **where)
        return dict(json.loads(done.stdout))

    with checked_out(options.baseline) as where:
        for seed in range(options.pairs):
            print("before", measure(seed, **where), flush=True)
            print("now   ", measure(seed), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
