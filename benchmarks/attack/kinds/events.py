"""F8: one tenant fills the log of events, and the events of others are lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.attack.callers import create_jobs
from benchmarks.attack.kinds.streams import large_spec
from benchmarks.attack.target import Attack, Progress, Target


async def fill(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Runs jobs with 12 MB of events each, for ever."""
    await create_jobs(target, progress, [large_spec()] * sizes["calls"])


ATTACKS = (
    Attack(
        "F8-eviction",
        "jobs with 12 MB of events each fill the log, here of 64 MiB",
        fill,
        {"calls": 4},
        {},
        settings={"IMG2IMG_EVENTS_MAX_BYTES": str(64 * 2**20)},
        seconds=15.0,
        keeps_events=True,
    ),
)
