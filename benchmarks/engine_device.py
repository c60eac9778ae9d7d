"""What a device makes of the real architectures: random weights, made in place, nothing to load.

Weights do not matter for speed. For each architecture: the device's matrix rate; time and rate of
a UNet step by batch size, eager and compiled; the end-to-end time of one request of 1 to 4 steps;
the systems of benchmarks.engine under the mixed load. Pictures stay in memory.

    python -m benchmarks.engine_device [--architectures sd15 sd-turbo sdxl-turbo] [--side 512]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine import compare, hardware
from benchmarks.engine_architectures import ARCHITECTURES, build
from benchmarks.engine_load import Request
from benchmarks.engine_servers import EngineServer, TimedDenoiser
from img2img_server.engine.denoiser import TextInput
from img2img_server.engine.load import choose_device, choose_dtype

BATCHES = (1, 2, 4, 8)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of one call, the device waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    one = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(lambda: one @ one, device, 10) / 1e12


class Steps:
    """Times the UNet of a denoiser by batch size."""

    def __init__(self, denoiser: TimedDenoiser, side: int, repeats: int) -> None:
        self._denoiser = denoiser
        self._side = side
        self._repeats = repeats
        text = TextInput(prompt="", negative_prompt="", guidance_scale=1.0, height=side, width=side)
        (self._conditioning,) = denoiser.encode_texts([text])

    def measure(self, rate: float) -> dict[str, dict[str, float]]:
        """Milliseconds and TFLOP/s of a step, and its share of the device's matrix rate."""
        counter = FlopCounterMode(display=False)
        with counter:
            self._step(1)()
        flops = counter.get_total_flops()
        found = {}
        for batch in BATCHES:
            took = seconds(self._step(batch), self._denoiser.device, self._repeats)
            achieved = flops * batch / took / 1e12
            found[str(batch)] = {
                "ms": round(took * 1e3, 2),
                "tflops": round(achieved, 4),
                "share": round(achieved / rate, 3),
            }
        return found

    def _step(self, batch: int) -> Callable[[], Any]:
        device, unet = self._denoiser.device, self._denoiser._unet
        channels = unet.config.in_channels
        latents = torch.randn(batch, channels, self._side // 8, self._side // 8, device=device)
        timesteps = torch.full((batch,), 500.0, device=device)
        return lambda: self._denoiser.denoise(latents, timesteps, [self._conditioning] * batch)


def request_latencies(pipeline: Any, side: int) -> dict[str, float]:
    """Milliseconds of one unguided request alone, by its steps; the median of five."""
    server = EngineServer(pipeline, capacity_rows=8)
    found = {}
    for steps in (1, 2, 3, 4):
        one = Request(0, 0.0, side, 1.0, steps, 1.0, "a harbour at dusk")
        times = [server.serve([replace(one, number=number)])[0][0].latency for number in range(7)]
        found[str(steps)] = round(statistics.median(times[2:]) * 1e3, 1)
    server.stop()
    return found


@torch.inference_mode()
def measure(name: str, arguments: argparse.Namespace, rate: float) -> dict[str, Any]:
    """The report of one architecture."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = build(name, Path(folder), device, dtype)
    denoiser = TimedDenoiser(pipeline)
    report: dict[str, Any] = {
        "eager": Steps(denoiser, arguments.side, arguments.repeats).measure(rate),
        "request_ms": request_latencies(pipeline, arguments.side),
        "load": compare(
            pipeline, arguments.requests, arguments.loads, [arguments.side], arguments.rows
        ),
    }
    if arguments.compile:
        denoiser._unet = torch.compile(denoiser._unet, mode="max-autotune", dynamic=False)
        report["compiled"] = Steps(denoiser, arguments.side, arguments.repeats).measure(rate)
    return report


def main() -> None:
    """Runs, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = list(ARCHITECTURES)
    parser.add_argument("--architectures", nargs="+", choices=choices, default=choices[:3])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.9])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    rate = matrix_rate(device, dtype)
    report = {
        "hardware": {**hardware(device, dtype), "matrix TFLOP/s": f"{rate:.2f}"},
        "side": arguments.side,
        "results": {name: measure(name, arguments, rate) for name in arguments.architectures},
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
