"""Attacks a service of its own and prints what another tenant notices: `make attack`.

    python -m benchmarks.attack [--only F1] [--short] [--list] [--output results.json]

The exit status is 1 if an attack is red.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.attack import report, runner
from benchmarks.attack.kinds import ALL
from benchmarks.attack.measure import innocent_calls
from benchmarks.attack.service import running_servers
from benchmarks.attack.target import Attack


async def run(attacks: Sequence[Attack], *, short: bool, folder: Path) -> list[runner.Outcome]:
    """Runs the attacks one after the other, each against a fresh service.

    The short form keeps one service for all attacks that need no settings of their own.
    """
    print(report.head(), flush=True)
    outcomes: list[runner.Outcome] = []
    async with running_servers(folder) as servers:
        shared = [attack for attack in attacks if short and not attack.settings]
        if shared:
            async with servers.service({}) as service:
                await innocent_calls(service.target, least=2)
                alone = await innocent_calls(service.target, least=runner.CALLS)
                for attack in shared:
                    outcomes.append(await runner.measure(service, attack, short=True, alone=alone))
                    print(report.line(outcomes[-1]), flush=True)
        for attack in attacks:
            if attack in shared:
                continue
            try:
                async with servers.service(attack.settings) as service:
                    outcomes.append(await runner.measure(service, attack, short=short))
                print(report.line(outcomes[-1]), flush=True)
            except Exception:
                traceback.print_exc()
                outcomes.append(
                    runner.Outcome(
                        attack.name, attack.title, {}, {}, {}, {}, {}, ["the run failed"]
                    )
                )
    return outcomes


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack", description=__doc__)
    parser.add_argument("--only", default="", help="names or beginnings of names, comma separated")
    parser.add_argument("--short", action="store_true", help="the form of CI, about a minute")
    parser.add_argument("--list", action="store_true", help="show the attacks and stop")
    parser.add_argument("--output", type=Path, help="write the results as JSON to this file")
    options = parser.parse_args()
    wanted = tuple(options.only.split(","))
    attacks = [
        attack
        for attack in ALL
        if attack.name.startswith(wanted) and not (options.short and attack.short is None)
    ]
    if options.list or not attacks:
        for attack in attacks:
            print(f"{attack.name:28}{attack.title}")
        return 0 if attacks else 2
    with tempfile.TemporaryDirectory() as folder:
        outcomes = asyncio.run(run(attacks, short=options.short, folder=Path(folder)))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report.as_json(outcomes), indent=2) + "\n")
    red = [outcome.attack for outcome in outcomes if outcome.faults]
    print(
        f"\n{len(outcomes) - len(red)} green, {len(red)} red{': ' if red else ''}{', '.join(red)}"
    )
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
