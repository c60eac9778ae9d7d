"""The attacker's process: `python -m benchmarks.attack.attacker NAME PARAMETERS TARGET`.

It has the lowest priority, since an attacker's own machine would not share the CPU with the
service. It writes its progress to stdout as lines of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from benchmarks.attack.kinds import ALL
from benchmarks.attack.target import Progress, Target

REPORT_SECONDS = 0.5


async def main(name: str, parameters: str, target: str) -> None:
    """Attacks until the process is ended."""
    attack = next(attack for attack in ALL if attack.name == name)
    progress = Progress()
    running = asyncio.create_task(attack.run(Target.load(target), progress, json.loads(parameters)))
    while True:
        await asyncio.wait({running}, timeout=REPORT_SECONDS)
        report = {"under_way": progress.is_under_way, "outcomes": progress.outcomes}
        print(json.dumps(report), flush=True)
        if running.done():
            running.result()
            return


if __name__ == "__main__":
    os.nice(19)
    asyncio.run(main(*sys.argv[1:]))
