"""Writes reports of the engine's benchmarks as JSON and Markdown tables. Must not import torch."""

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
    "device_seconds": "device s an image",
    "busy_share": "busy",
    "overhead": "overhead",
}
READING = """\
Loads are shares of the rate that (a) can serve. Below saturation, the throughput of every system
that keeps up is the rate of arrivals, so only `saturated` has it, where all requests of a round
wait from the start. It counts to the last image, including the end, when few requests are left to
share a step. The device's time for an image shows at each load the rate that could be served.
Short requests are the third with the fewest pixels x forwards, long ones the third with the most.
A short request is behind a long one if it arrives before the long one could be finished alone.
Latencies are those of all rounds together."""

# The throughput to reach, as a multiple of the stock pipeline's; a forward of Z-Image pads all rows
# to the longest one.
_LEAST = {"z_image": 1.0}
_LEAST_OF_OTHERS, _LEAST_P95 = 1.2, 3.0


def write(report: Mapping[str, Any], output: Path | None, markdown: Callable[[Any], str]) -> None:
    """Writes the report as JSON and as Markdown next to it; None: not at all."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def load_table(load: str, systems: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the table of a load; its name ends with `saturated` or its share."""
    columns = {"throughput": "images/s", **COLUMNS} if load.endswith(SATURATED) else COLUMNS
    return table(load, systems, columns)


def table(
    title: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> list[str]:
    """Returns the lines of a Markdown table.

    Args:
        columns: keys of a row with their headings; None: all keys, with the key as heading.
    """
    columns = columns or {key: key for row in rows.values() for key in row}
    lines = ["", f"**{title}**", "", "| | " + " | ".join(columns.values()) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(str(row.get(key, "")) for key in columns) + " |")
    return lines


def facts(values: Mapping[str, Any]) -> str:
    """Returns the values in one line."""
    return ", ".join(f"{key}: {value}" for key, value in values.items())


def misses(report: dict[str, Any]) -> list[str]:
    """Returns a sentence for each ratio that is too small."""
    found = []
    for family, one in report["families"].items():
        least = _LEAST.get(family, _LEAST_OF_OTHERS)
        if one["throughput ratio"] < least:
            found.append(f"{family}: throughput {one['throughput ratio']}, at least {least}")
        if one["short p95 ratio"] < _LEAST_P95:
            found.append(f"{family}: short p95 {one['short p95 ratio']}, at least {_LEAST_P95}")
    return found
