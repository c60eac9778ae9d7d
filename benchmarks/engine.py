"""Compares the engine with the stock pipeline of diffusers under the same mixed load.

Four systems run one model on one device: (a) the stock pipeline, one request at a time; (b) the
stock pipeline in batches of requests that can share a call; (c) a LitServe server with its dynamic
batching around the stock pipeline, called over HTTP; (d) this engine. Each has its own process with
the same number of threads. Load 1.0 is the rate that (a) can just serve; in `saturated` all
requests of a round wait from the start, which measures throughput.

A load is served in rounds: each system serves the same requests, one system after the other. The
first system changes from round to round, so that a machine that becomes slower slows all of them.
The report has the numbers of every round and of all rounds together.

    python -m benchmarks.engine [--model DIR] [--requests 30] [--rounds 3] [--loads 0.5 0.9]
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.ending import end_on_sigterm
from benchmarks.engine_litserve import LitServeServer, install
from benchmarks.engine_load import (
    UNET,
    Request,
    Served,
    Traits,
    behind_long,
    merged,
    requests,
    summary,
)
from benchmarks.engine_process import EngineOf, Place, RemoteServer, Server, StockOf
from benchmarks.engine_report import READING, SATURATED, facts, load_table, write
from img2img_server.engine.device import choose_device, choose_dtype
from img2img_server.engine.model_spec import read_model_spec


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the whole report."""
    spec = read_model_spec(arguments.model)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    place = place_of(spec.source, device, dtype, arguments.rows)
    report = {
        "what": "mixed load: strength 0.3 to 0.9, 4 to 30 steps, half of it guided",
        "note": arguments.note,
        "command": " ".join(sys.argv[1:]),
        "model": spec.name,
        "requests": arguments.requests,
        "rounds": arguments.rounds,
        "sides": arguments.sides,
        "rows": arguments.rows,
        "hardware": hardware(device, dtype),
        "results": {},
    }
    servers = systems(place, arguments.litserve)
    sizes = arguments.requests, arguments.loads, arguments.sides, arguments.rounds
    for name, found in compare(servers, *sizes):
        report["results"][name] = found
        # This server is also stopped if the next one fails.
        write(report, arguments.output, markdown)
    return report


def place_of(source: str, device: torch.device, dtype: torch.dtype, rows: int) -> Place:
    name = str(dtype).removeprefix("torch.")
    return Place(source, str(device), name, torch.get_num_threads(), rows)


def systems(place: Place, litserve: bool = True) -> dict[str, Server]:
    """Returns the systems to compare, LitServe if requested."""
    found: dict[str, Server] = {
        "(a) stock, one at a time": RemoteServer(StockOf(place, 1)),
        "(b) stock, static batches": RemoteServer(StockOf(place, place.rows)),
    }
    if litserve and install():
        log = Path(".img2img") / "litserve.log"
        found["(c) LitServe, dynamic batches"] = LitServeServer(place, log)
    found["(d) this engine"] = RemoteServer(EngineOf(place))
    return found


def compare(
    servers: dict[str, Server],
    count: int,
    loads: Sequence[float],
    sides: Sequence[int],
    rounds: int = 1,
    seconds: float = math.inf,
    traits: Traits = UNET,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Serves every load with every system; yields the load and the summaries. Stops the systems.

    Args:
        count: requests of a round.
        seconds: limit of the first system's work. Requests beyond the limit are left out, but at
            least eight remain.
    """
    try:
        for server in servers.values():
            server.serve(requests(4, None, sides, 99, traits))  # This load warms up the systems.
        alone = next(iter(servers.values())).serve(requests(count, None, sides, traits=traits))
        pace = alone.busy / sum(outcome.request.pixel_forwards for outcome in alone.outcomes)
        rate_alone = count / alone.busy
        count = max(min(8, count), int(count * min(1.0, seconds / alone.busy)))
        rates: dict[str, float | None] = {f"load {load:g}": load * rate_alone for load in loads}
        for name, rate in {SATURATED: None, **rates}.items():
            rounds_of = [requests(count, rate, sides, seed, traits) for seed in range(rounds)]
            yield name, serve_rounds(servers, rounds_of, pace)
    finally:
        for server in servers.values():
            server.stop()


def serve_rounds(
    servers: dict[str, Server], loads: Iterable[Sequence[Request]], pace: float
) -> dict[str, dict[str, Any]]:
    """Serves a load with each system in turn: the first one of a round is the last of the next."""
    served: dict[str, list[Served]] = {label: [] for label in servers}
    line, behind = list(servers.items()), set[int]()
    for load in loads:  # A load can depend on measurements that are made when it is asked for.
        behind |= behind_long(load, pace)
        for label, server in line:
            served[label].append(server.serve(load))
            print(label, summary(served[label][-1]), flush=True)
        line = [*line[1:], line[0]]
    return {
        label: {
            **summary(merged(rounds), behind),
            "rounds": [summary(one, behind) for one in rounds],
        }
        for label, rounds in served.items()
    }


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Returns the hardware and the versions of libraries."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_model(),
        **({"driver": _driver(), "cuda": str(torch.version.cuda)} if is_gpu else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if not program:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as Markdown tables."""
    head = f"Model {report['model']}, {report['rounds']} rounds of {report['requests']} requests, "
    head += f"{report['what']}; sides {report['sides']}, at most {report['rows']} rows. "
    head += facts(report["hardware"])
    lines = [head, "", f"`python -m benchmarks.engine {report['command']}`", "", READING]
    lines += ["", report["note"]] if report["note"] else []
    for load, found in report["results"].items():
        lines += load_table(load, found)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the benchmark; prints the tables and writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.9])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 320])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of torch; 0: torch's default"
    )
    parser.add_argument("--litserve", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--note", default="", help="note about this run, for the report")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    end_on_sigterm()
    report = measure(arguments)
    print(markdown(report))


if __name__ == "__main__":
    main()
