"""Measures a step and a decode with each speed setting, with the model that ships.

    python -m benchmarks.engine_switches [--sides 256 512] [--switches plain fuse_qkv ...]

Every setting has its own engine in its own process. The figures are milliseconds of a step and of
the decode of a guided job that runs alone, the median of `--repeats`. Settings take turns, so that
a machine that becomes slower slows all of them. `ready`: seconds to load, compile and warm up at
all sizes, one engine after the other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny, UNet2DConditionModel

from benchmarks.ending import end_on_sigterm
from benchmarks.engine import hardware
from benchmarks.engine_load import Request
from benchmarks.engine_report import facts, table, write
from benchmarks.engine_servers import job_of
from img2img_server.domain.job import Timings
from img2img_server.engine.base import EngineEvent, JobDone, JobFailed
from img2img_server.engine.device import choose_device, choose_dtype
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.load import load_engine
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.engine.options import EngineOptions, limit_spinning
from img2img_server.settings import Settings

_WHOLE = {"compile": "whole", "compile_cache_dir": "cache/whole"}
# Values of settings. Paths are in the folder of this run.
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels_last=false": {"channels_last": False},
    "fuse_qkv=true": {"fuse_qkv": True},
    "dtype=bfloat16": {"dtype": "bfloat16"},
    "torch_threads=1": {"torch_threads": 1},
    "tiny_vae, use images": {"tiny_vae": "tiny", "tiny_vae_use": "images"},
    "compile=regional, nothing kept": {
        "compile": "regional",
        "compile_cache_dir": "cache/regional",
    },
    "compile=whole, nothing kept": _WHOLE,
    "compile=whole, kept by the one above": _WHOLE,
}
_PATHS = ("tiny_vae", "compile_cache_dir")
_STEPS = 4


class Switched:
    """An engine in its own process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context)
        self.ready = self._pool.submit(_load, settings).result()

    def run(self, side: int) -> Timings:
        """Runs a job of `_STEPS` steps alone."""
        return self._pool.submit(_run, side).result()

    def stop(self) -> None:
        self._pool.submit(_stop).result()
        self._pool.shutdown()


_engines: list[DiffusionEngine] = []  # The process runs only this job.


def _load(settings: dict[str, Any]) -> float:
    began = time.perf_counter()
    _engines.append(load_engine(EngineOptions.of(Settings(**settings))))
    return time.perf_counter() - began


def _run(side: int) -> Timings:
    done: queue.SimpleQueue[Timings | Exception] = queue.SimpleQueue()

    def sink(event: EngineEvent) -> None:
        match event:
            case JobDone(timings):
                done.put(timings)
            case JobFailed(error):
                done.put(error)

    job = job_of(Request(1, 0.0, side, 1.0, _STEPS, 5.0, "a mosaic"))
    _engines[0].submit(replace(job, params=replace(job.params, preview_interval_steps=0)), sink)
    answer = done.get()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _stop() -> None:
    _engines.pop().stop()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the report."""
    device = choose_device(arguments.device)
    spec = read_model_spec(arguments.model)
    sizes = ", ".join(f"{side}x{side}" for side in arguments.sides)
    common = {
        "model": arguments.model,
        "device": arguments.device,
        "warm_up_sizes": sizes,
        "max_batch_size": 2,  # one guided sample
    }
    engines: dict[str, Switched] = {}
    with tempfile.TemporaryDirectory() as folder:
        _save_tiny(spec.source, folder)
        try:
            for name in arguments.switches:
                switch = SWITCHES[name]
                places = {key: f"{folder}/{switch[key]}" for key in _PATHS if key in switch}
                engines[name] = Switched({**common, **switch, **places})
            results = {
                str(side): compare(engines, side, arguments.repeats) for side in arguments.sides
            }
        finally:
            for engine in engines.values():
                engine.stop()
    return {
        "model": spec.name,
        "command": " ".join(sys.argv[1:]),
        "hardware": hardware(device, choose_dtype("auto", device)),
        "ready": {name: {"ready s": round(engine.ready, 1)} for name, engine in engines.items()},
        "results": results,
    }


def _save_tiny(source: str, folder: str) -> None:
    """Saves a TAESD for the model's latents, which is as fast as a trained one."""
    unet = UNet2DConditionModel.load_config(source, subfolder="unet")
    tiny: Any = AutoencoderTiny(latent_channels=unet["in_channels"])  # type: ignore[no-untyped-call]
    tiny.save_pretrained(f"{folder}/tiny")


def compare(engines: dict[str, Switched], side: int, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the times of every setting at one size."""
    jobs: dict[str, list[Timings]] = {name: [] for name in engines}
    for _ in range(repeats + 1):
        for name, engine in engines.items():
            jobs[name].append(engine.run(side))
    return {
        name: {
            "step ms": _median_ms([job.denoise / job.steps for job in timings[1:]]),
            "decode ms": _median_ms([job.decode for job in timings[1:]]),
        }
        for name, timings in jobs.items()
    }


def _median_ms(values: Sequence[float]) -> float:
    return round(statistics.median(values) * 1e3, 1)


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as Markdown tables."""
    head = f"Model {report['model']}, one guided row. {facts(report['hardware'])}"
    lines = [head, "", f"`python -m benchmarks.engine_switches {report['command']}`"]
    for side, switches in report["results"].items():
        lines += table(f"{side}x{side}", switches)
    lines += table("seconds until ready, warmed up at all of these sizes", report["ready"])
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the benchmark; prints and writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--switches", nargs="+", choices=list(SWITCHES), default=list(SWITCHES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    end_on_sigterm()
    limit_spinning()  # Processes of the engines inherit this variable.
    report = measure(arguments)
    print(markdown(report))
    write(report, arguments.output, markdown)


if __name__ == "__main__":
    main()
