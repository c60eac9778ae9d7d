"""Compares the engine with the stock pipeline for each family, with the small models of the oracle.

Both run the same mixed load in turns: strength 0.3 to 0.9, 4 to 30 steps, guidance off and on. In
`16 in flight`, 16 requests wait from the start of a round, which measures throughput; at `load 0.9`
requests arrive at nine tenths of the rate that the stock pipeline can just serve.

    python -m benchmarks.engine_families [--families flux z_image] [--rounds 3] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ending import end_on_sigterm
from benchmarks.engine import hardware, serve_rounds
from benchmarks.engine_load import STEPS, Request, Traits, requests
from benchmarks.engine_process import EngineOf, Place, RemoteServer, Server, StockOf
from benchmarks.engine_report import facts, misses, table, write
from img2img_server.engine.model_spec import ModelSpec, read_model_spec
from tests.oracle.harness import OracleModel, families

IN_FLIGHT, LOAD = "16 in flight", "load 0.9"
_STOCK, _ENGINE = "stock, one at a time", "this engine"
# The stock pipeline of latent consistency models refuses more steps than 50 x strength.
_STEPS = {"lcm": (2, 4, 8, 12)}


def measure(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of the first model of a family."""
    name, model = next(iter(families()[family].items()))
    with tempfile.TemporaryDirectory() as folder:
        source = str(model.write(Path(folder)))
        traits = traits_of(read_model_spec(source), model)
        place = Place(source, "cpu", "float32", arguments.threads, arguments.rows, oracle=name)
        servers: dict[str, Server] = {
            _STOCK: RemoteServer(StockOf(place, 1)),
            _ENGINE: RemoteServer(EngineOf(place)),
        }
        try:
            return compare(servers, arguments, traits) | {"model": name}
        finally:
            for server in servers.values():
                server.stop()


def traits_of(spec: ModelSpec, model: OracleModel) -> Traits:
    """Returns the traits of requests to a model."""
    return Traits(
        scheduler=(model.schedulers or (spec.scheduler,))[0],
        strength_rule=spec.strength_rule,
        guidance=spec.guidance,
        guidance_scales=(model.guidance_scales[0], model.guidance_scales[-1]),
        steps=_STEPS.get(spec.family, STEPS),
    )


def compare(
    servers: dict[str, Server], arguments: argparse.Namespace, traits: Traits
) -> dict[str, Any]:
    """Returns the summaries of both loads, and the ratios."""
    sides, rounds = arguments.sides, arguments.rounds
    for server in servers.values():
        # These requests warm the systems up.
        server.serve(requests(4, None, sides, seed=99, traits=traits))
    alone = servers[_STOCK].serve(requests(16, None, sides, seed=98, traits=traits))
    pace = alone.busy / sum(outcome.request.pixel_forwards for outcome in alone.outcomes)
    waiting = [requests(16, None, sides, seed, traits) for seed in range(rounds)]
    saturated = serve_rounds(servers, waiting, pace)
    arriving = (
        at_share(servers[_STOCK], requests(arguments.requests, 1.0, sides, seed, traits), 0.9)
        for seed in range(rounds)
    )
    loaded = serve_rounds(servers, arriving, pace)
    return {
        "results": {IN_FLIGHT: saturated, LOAD: loaded},
        "throughput ratio": _ratio(saturated, "throughput", _ENGINE, _STOCK),
        "short p95 ratio": _ratio(loaded, "short_p95", _STOCK, _ENGINE),
    }


def at_share(stock: Server, load: Sequence[Request], share: float) -> list[Request]:
    """Returns a load with the rate that is a share of what the stock pipeline can serve now.

    The stock pipeline serves the same requests before each round, because the machine does not keep
    its speed.

    Args:
        load: Requests at one a second.
    """
    alone = stock.serve([replace(request, arrival=0.0) for request in load])
    pause = alone.busy / len(load) / share
    return [replace(request, arrival=request.arrival * pause) for request in load]


def _ratio(found: dict[str, Any], key: str, over: str, under: str) -> float:
    return round(float(found[over][key] / max(found[under][key], 1e-9)), 2)


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as a Markdown table."""
    rows = {}
    for family, found in report["families"].items():
        waiting, loaded = found["results"][IN_FLIGHT], found["results"][LOAD]
        rows[family] = {
            "model": found["model"],
            "images/s: stock": waiting[_STOCK]["throughput"],
            "engine": waiting[_ENGINE]["throughput"],
            "ratio": found["throughput ratio"],
            "short p95 s: stock": loaded[_STOCK]["short_p95"],
            "this engine": loaded[_ENGINE]["short_p95"],
            "stock / engine": found["short p95 ratio"],
        }
    lines = [
        f"{report['what']}. {facts(report['hardware'])}",
        "",
        f"`python -m benchmarks.engine_families {report['command']}`",
        *table("by family", rows),
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Runs the families, prints and writes the report; exits with 1 if a ratio is too small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=list(families()), default=list(families()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40, help="of a round at load 0.9")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    end_on_sigterm()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "what": "mixed load: strength 0.3 to 0.9, 4 to 30 steps, guidance off and on",
        "command": " ".join(sys.argv[1:]),
        "hardware": hardware(torch.device("cpu"), torch.float32),
        "families": {},
    }
    for family in arguments.families:
        report["families"][family] = measure(family, arguments)
        # Write the report after each family, so that a later failure does not lose it.
        write(report, arguments.output, markdown)
    print(markdown(report))
    missed = misses(report)
    print("\n".join(missed))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
