"""Reports of the engine's benchmarks: JSON, and tables for people. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SATURATED = "saturated"
COLUMNS = {
    "median": "median s",
    "p95": "p95 s",
    "p99": "p99 s",
    "short_median": "short: median s",
    "short_p95": "short: p95 s",
    "behind_p95": "short behind long: p95 s",
    "first_look_median": "first look s",
    "device_seconds": "device s a picture",
    "busy_share": "busy",
    "overhead": "overhead",
}
READING = """\
Loads are shares of what (a) can serve. Below saturation every system that keeps up serves what
comes, so throughput is told of `saturated` only, where all requests of a round wait from the start;
it counts to the last picture, the end included at which few are left to share a step. What the
device works for a picture says at each load what could be served. Short requests are the third with
the fewest pixels x forwards, long ones the third with the most; short ones behind a long one are
those that come while it could not be done yet, had it been alone from its arrival. Latencies are
those of all rounds together."""


def write(report: Mapping[str, Any], output: Path | None, markdown: Callable[[Any], str]) -> None:
    """As JSON, and as Markdown beside it; None: nowhere."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def load_table(load: str, systems: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What each system made of a load, which ends with the word `saturated` or its share."""
    columns = {"throughput": "pictures/s", **COLUMNS} if load.endswith(SATURATED) else COLUMNS
    return table(load, systems, columns)


def table(
    title: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> list[str]:
    """Lines of Markdown.

    Args:
        columns: keys of a row and what stands above them; None: all, under their keys.
    """
    columns = columns or {key: key for row in rows.values() for key in row}
    lines = ["", f"**{title}**", "", "| | " + " | ".join(columns.values()) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(str(row.get(key, "")) for key in columns) + " |")
    return lines


def facts(values: Mapping[str, Any]) -> str:
    """In one line."""
    return ", ".join(f"{key}: {value}" for key, value in values.items())
