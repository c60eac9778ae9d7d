"""Runs the scenarios and prints a table, next to the same run of another version.

    python -m benchmarks.fleet [--only equal,join] [--devices 1] [--baseline HEAD~1]

`--baseline` checks a commit out in a temporary folder and runs the scenarios on its server code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
from typing import Any

import structlog

from benchmarks.fleet.baseline import checked_out
from benchmarks.fleet.device import BATCHES, ONE_ROW, Costs
from benchmarks.fleet.scenarios import SCENARIOS

DEVICES = (ONE_ROW, BATCHES)


async def measure(devices: list[Costs], names: list[str]) -> list[dict[str, Any]]:
    """Returns one entry for each device and scenario."""
    found: list[dict[str, Any]] = []
    for costs in devices:
        for name in names:
            result = await SCENARIOS[name](costs)
            entry = {"device": costs.name, "line": result.line, "value": round(result.value, 3)}
            found.append(entry | {"most": round(result.most, 3), "detail": result.detail})
            print(
                f"{costs.name}: {result.line}: {result.value:.2f} ({result.detail})",
                file=sys.stderr,
            )
    return found


def measure_baseline(commit: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Runs the scenarios on the server code of a commit."""
    with checked_out(commit) as where:
        command = [sys.executable, "-m", "benchmarks.fleet", "--json", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, **where)
        return list(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, with commas")
    parser.add_argument("--devices", default="0,1", help="0: one row at a time, 1: batches")
    parser.add_argument("--baseline", default="", help="a commit to compare with")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    devices = [DEVICES[int(number)] for number in options.devices.split(",")]
    here = asyncio.run(measure(devices, options.only.split(",")))
    if options.json:
        print(json.dumps(here))
        return 0
    there: list[dict[str, Any]] = [{}] * len(here)
    if options.baseline:
        there = measure_baseline(
            options.baseline, ["--only", options.only, "--devices", options.devices]
        )
    print("| device | line | at most | before | now |")
    print("| --- | --- | --- | --- | --- |")
    for now, before in zip(here, there, strict=True):
        old = f"{before['value']} ({before['detail']})" if before else ""
        print(
            f"| {now['device']} | {now['line']} | {now['most']} | {old} "
            f"| {now['value']} ({now['detail']}) |"
        )
    return int(any(entry["value"] > entry["most"] for entry in here))


if __name__ == "__main__":
    sys.exit(main())
