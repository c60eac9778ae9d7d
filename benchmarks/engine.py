"""The engine against the stock pipeline of diffusers under the same mixed load.

Compared on one model and device: (a) the stock pipeline, one request at a time; (b) the stock
pipeline in batches of what may share a call; (c) a LitServe server with its dynamic batching around
the stock pipeline, asked over HTTP; (d) this engine. Load 1.0 is what (a) can just serve; `burst`
has all requests arrive at once.

    python -m benchmarks.engine [--model DIR] [--requests 30] [--loads 0.5 0.9] [--sides 256 320]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.engine_clock import Clock
from benchmarks.engine_litserve import LitServeServer, install
from benchmarks.engine_load import Request, Served, requests, summary
from benchmarks.engine_servers import EngineServer
from benchmarks.engine_stock import StockServer, load_pipeline
from img2img_server.engine.load import choose_device, choose_dtype, keep_freed_memory
from img2img_server.engine.model_spec import read_model_spec

COLUMNS = {
    "throughput": "pictures/s",
    "median": "median s",
    "p95": "p95 s",
    "p99": "p99 s",
    "short_median": "short: median s",
    "short_p95": "short: p95 s",
    "first_look_median": "first look s",
    "busy_share": "busy",
    "overhead": "overhead",
}


class Server(Protocol):
    """A system that is compared."""

    def serve(self, load: Sequence[Request]) -> Served:
        """Runs a load in real time."""
        ...

    def stop(self) -> None:
        """Ends what it runs."""
        ...


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    spec = read_model_spec(arguments.model)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()  # as our worker does; here for all systems
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    pipeline = load_pipeline(spec.source, device, dtype)
    return {
        "what": "mixed load: strength 0.3 to 0.9, 4 to 30 steps, half of it guided",
        "note": arguments.note,
        "model": spec.name,
        "requests": arguments.requests,
        "sides": arguments.sides,
        "rows": arguments.rows,
        "hardware": hardware(device, dtype),
        "results": compare(
            systems(pipeline, spec.source, arguments.rows, arguments.wheels, arguments.litserve),
            arguments.requests,
            arguments.loads,
            arguments.sides,
        ),
    }


def systems(
    pipeline: Any, source: str, rows: int, wheels: Path | None, litserve: bool = True
) -> dict[str, Server]:
    """What is compared, on one pipeline; LitServe, if wanted, loads its own from `source`."""
    clock = Clock(pipeline)
    found: dict[str, Server] = {
        "(a) stock, one at a time": StockServer(pipeline, clock, 1),
        "(b) stock, static batches": StockServer(pipeline, clock, rows),
    }
    if litserve and install(wheels):
        unet = pipeline.unet
        log = Path(".img2img") / "litserve.log"
        found["(c) LitServe, dynamic batches"] = LitServeServer(
            source, rows, unet.device, unet.dtype, log
        )
    found["(d) this engine"] = EngineServer(pipeline, clock, rows)
    return found


def compare(
    servers: dict[str, Server], count: int, loads: Sequence[float], sides: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Serves every load with every system; summaries by load and system. Stops the systems."""
    try:
        alone = next(iter(servers.values()))
        for server in servers.values():
            server.serve(requests(4, None, sides, seed=99))  # warm up
        service_seconds = alone.serve(requests(count, None, sides)).busy / count
        rates: dict[str, float | None] = {
            f"load {load:g}": load / service_seconds for load in loads
        }
        results: dict[str, dict[str, Any]] = {}
        for name, rate in {**rates, "burst": None}.items():
            load = requests(count, rate, sides)
            results[name] = {}
            for label, server in servers.items():
                results[name][label] = summary(server.serve(load))
                print(name, label, results[name][label], flush=True)
        return results
    finally:
        for server in servers.values():
            server.stop()


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def markdown(report: dict[str, Any]) -> str:
    """The report as tables for people."""
    lines = [f"Model {report['model']}, {report['requests']} requests, {report['what']}; "]
    lines[0] += f"sides {report['sides']}, at most {report['rows']} rows. "
    lines[0] += ", ".join(f"{key}: {value}" for key, value in report["hardware"].items())
    lines += ["", report["note"]] if report["note"] else []
    for load, systems in report["results"].items():
        lines += ["", f"**{load}**", "", "| | " + " | ".join(COLUMNS.values()) + " |"]
        lines.append("|---|" + "---|" * len(COLUMNS))
        for label, values in systems.items():
            lines.append(f"| {label} | " + " | ".join(str(values[key]) for key in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs, prints the tables, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.9])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 320])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--wheels", type=Path, help="folder with LitServe's wheels; default: pip")
    parser.add_argument("--litserve", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--note", default="", help="what else is to be known of this run")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments)
    print(markdown(report))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
