"""Breaks a service of its own under load and counts the damage: `make chaos`.

    python -m benchmarks.chaos [--only "S3 away,NATS away"] [--short] [--output results.json]

Counts of the table: jobs that did not end with their images (lost), jobs that exist twice for one
request, events or images that are wrong, and attempts that were counted without need (wasted). The
exit status is 1 unless all of them are 0. The short form keeps one service for all scenarios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.chaos.load import Damage, Load
from benchmarks.chaos.scenarios import ALL, Scenario, ready
from benchmarks.chaos.service import Service

HEAD = ("scenario", "injected", "jobs", "lost", "doubled", "wrong", "wasted", "seconds")


@dataclass(frozen=True)
class Outcome:
    """The result of a scenario. `injected`: the number of faults."""

    name: str
    injected: int
    damage: Damage
    seconds: float


async def run(chosen: Sequence[Scenario], folder: Path, *, short: bool) -> list[Outcome]:
    """Runs the scenarios one after the other and prints their rows."""
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    if short:
        async with ready(folder) as (service, load):
            return [await _measured(each, service, load, short=True) for each in chosen]
    outcomes = []
    for number, each in enumerate(chosen):
        async with ready(folder / str(number), has_cluster=each.has_cluster) as (service, load):
            outcomes.append(await _measured(each, service, load, short=False))
    return outcomes


async def _measured(scenario: Scenario, service: Service, load: Load, *, short: bool) -> Outcome:
    load.begin()
    began = time.monotonic()
    injected, damage = await scenario.run(service, load, short)
    outcome = Outcome(scenario.name, injected, damage, time.monotonic() - began)
    print(row(outcome), flush=True)
    for fault in damage.faults[:20]:
        print(f"  {scenario.name}: {fault}", file=sys.stderr, flush=True)
    return outcome


def row(outcome: Outcome) -> str:
    """Returns a row of the table."""
    damage = outcome.damage
    counts = (damage.jobs, damage.lost, damage.doubled, damage.wrong, damage.wasted)
    cells = (outcome.name, outcome.injected, *counts, f"{outcome.seconds:.0f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--only", default="", help="names of scenarios, comma separated")
    parser.add_argument("--short", action="store_true", help="the form of CI, about a minute")
    parser.add_argument("--output", type=Path, help="write the results as JSON to this file")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [each.name for each in ALL]
    chosen = [
        each for each in ALL if each.name in wanted and not (options.short and each.has_cluster)
    ]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = asyncio.run(run(chosen, Path(folder), short=options.short))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
    return 0 if outcomes and all(each.damage.is_zero for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
