"""What a device makes of the real architectures: random weights, made in place, nothing to load.

Weights do not matter for speed. For each architecture, in this order: time and rate of a UNet step
by batch size, eager, as CUDA graphs and compiled; the end-to-end time of one request of 1 to 4
steps, eager and compiled; the systems of benchmarks.engine under the mixed load. Pictures stay in
memory. What fails is noted and the rest goes on; what does not fit the budget is left out and
named; the report is written after every part. One call of under ten minutes:

    python -m benchmarks.engine_device --output FILE.json [--budget 540] [--wheels DIR]

On a bare machine with torch, first collect wheels elsewhere and bring them along:
benchmarks/device.sh does both.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import compare, hardware, place_of, systems
from benchmarks.engine_architectures import ARCHITECTURES, build
from benchmarks.engine_device_parts import Steps, matrix_rate, request_latencies
from benchmarks.engine_process import end_on_sigterm
from img2img_server.engine.diffusers_denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers_load import accelerate
from img2img_server.engine.load import choose_device, choose_dtype
from img2img_server.engine.options import Compile, ModelOptions


class Report:
    """The parts, each run within the budget, noted as soon as it is done.

    Args:
        output: a JSON file that is written anew after every part; None: printed only.
        budget: seconds for all of it.
    """

    def __init__(self, head: dict[str, Any], output: Path | None, budget: float) -> None:
        self._report: dict[str, Any] = {**head, "results": {}, "left_out": [], "failed": {}}
        self._output = output
        self._began, self._budget = time.monotonic(), budget

    def part(self, architecture: str, name: str, needs: float, work: Callable[[], Any]) -> None:
        """Runs one part if `needs` seconds are left; a failure is noted with its last lines."""
        left = self._budget - (time.monotonic() - self._began)
        if left < needs:
            self._report["left_out"].append(f"{architecture}: {name}")
        else:
            began = time.monotonic()
            try:
                found = work()
            except Exception:  # one part must not cost the others
                self._report["failed"][f"{architecture}: {name}"] = traceback.format_exc()[-2000:]
            else:
                self._report["results"].setdefault(architecture, {})[name] = found
            print(f"{architecture}: {name} took {time.monotonic() - began:.1f} s", flush=True)
        if self._output:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._output.write_text(self.text, encoding="utf-8")

    @property
    def text(self) -> str:
        return json.dumps(self._report, indent=2) + "\n"


def measure(name: str, arguments: argparse.Namespace, report: Report, rate: float) -> None:
    """All parts of one architecture."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    repeats, side = arguments.repeats, arguments.side
    with tempfile.TemporaryDirectory() as folder:
        pipeline = build(name, Path(folder), device, dtype)

    def steps(batches: list[int], **compiler: Any) -> dict[str, Any]:
        denoiser = DiffusersDenoiser(pipeline)
        if compiler:
            torch._dynamo.reset()
            denoiser._unet = torch.compile(denoiser._unet, dynamic=False, **compiler)
        return Steps(denoiser, side, repeats).measure(rate, batches)

    def compiled_requests() -> dict[str, float]:
        torch._dynamo.reset()
        options = ModelOptions(compile=Compile.WHOLE)
        accelerate(pipeline, options)
        return request_latencies(pipeline, side, options)

    few = arguments.compiled_batches
    report.part(name, "steps, eager", 20, lambda: steps(arguments.batches))
    report.part(name, "request ms, eager", 10, lambda: request_latencies(pipeline, side))
    if arguments.compile:
        if device.type == "cuda":
            graphs = {"backend": "cudagraphs"}
            report.part(name, "steps, CUDA graphs", 40, lambda: steps(few, **graphs))
        mode = {"mode": "reduce-overhead"} if device.type == "cuda" else {"mode": "default"}
        report.part(name, "steps, compiled", 120, lambda: steps(few, **mode))
    if name in arguments.loaded:
        report.part(name, "mixed load", 90, lambda: loads(name, device, dtype, arguments))
    if arguments.compile:  # last: it leaves the pipeline compiled
        report.part(name, "request ms, compiled", 60, compiled_requests)


def loads(
    name: str, device: torch.device, dtype: torch.dtype, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The systems of benchmarks.engine."""
    place = place_of(name, device, dtype, arguments.rows)
    servers = systems(place, arguments.wheels, arguments.litserve)
    sizes = arguments.requests, arguments.loads, [arguments.side], arguments.rounds
    return dict(compare(servers, *sizes))


def main(words: Sequence[str] | None = None) -> None:
    """Runs, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = list(ARCHITECTURES)
    parser.add_argument("--architectures", nargs="+", choices=choices, default=choices[:3])
    parser.add_argument("--loaded", nargs="*", choices=choices, default=["sd-turbo"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--compiled-batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.9])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--litserve", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    parser.add_argument("--wheels", type=Path, help="folder with LitServe's wheels; default: pip")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    end_on_sigterm()
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    rate = matrix_rate(device, dtype)
    head = {
        "hardware": {**hardware(device, dtype), "matrix TFLOP/s": f"{rate:.2f}"},
        "side": arguments.side,
    }
    report = Report(head, arguments.output, arguments.budget)
    with torch.inference_mode():
        for name in arguments.architectures:
            measure(name, arguments, report, rate)
            gc.collect()  # the next one may need all of the device
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(report.text)


if __name__ == "__main__":
    main()
