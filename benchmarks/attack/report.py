"""Prints the results of attacks as a table."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable
from typing import Any

from benchmarks.attack.measure import Latencies
from benchmarks.attack.runner import MOST_MB, PLUS_SECONDS, TIMES, Outcome

_COLUMNS = ("attack", "grpc alone", "attacked", "http alone", "attacked", "key in body", "attacked")
_WIDTHS = (28, 12, 13, 12, 13, 13, 13)


def head() -> str:
    """Returns the lines above the table."""
    titles = [title.ljust(width) for title, width in zip(_COLUMNS, _WIDTHS, strict=True)]
    explained = (
        f"The innocent tenant's calls: median / worst in seconds. Green: worst under attack at "
        f"most {TIMES:g} times the worst alone plus {PLUS_SECONDS:g} s, no call fails, and "
        + ", ".join(f"{name} below {most} MB" for name, most in MOST_MB.items())
        + ". PSS in MB."
    )
    return f"{explained}\n\n{''.join(titles)}api  gateway  worker  nats"


def line(outcome: Outcome) -> str:
    """Returns the line of one attack, and below it why it is red."""
    cells = [outcome.attack.ljust(_WIDTHS[0])]
    for at, way in enumerate(outcome.alone):
        for latencies, width in zip(
            (outcome.alone[way], outcome.attacked[way]), _WIDTHS[1 + 2 * at :][:2], strict=True
        ):
            cells.append(_pair(latencies).ljust(width))
    memory = [f"{outcome.peak_mb.get(name, 0):4}" for name in ("api", "gateway", "worker", "nats")]
    text = f"{''.join(cells)}{'  '.join(memory)}  {'RED' if outcome.faults else 'green'}"
    requests = ", ".join(f"{count} {name}" for name, count in sorted(outcome.requests.items()))
    lines = [text, *outcome.faults, *([f"attacker: {requests}"] if requests else [])]
    return "\n    ".join(lines)


def _pair(latencies: Latencies) -> str:
    return f"{latencies.median:.2f}/{latencies.worst:.2f}"


def as_json(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Returns the results with the machine that they were measured on."""
    return {
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
        },
        "bound": {"times": TIMES, "plus_seconds": PLUS_SECONDS, "most_mb": MOST_MB},
        "attacks": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
