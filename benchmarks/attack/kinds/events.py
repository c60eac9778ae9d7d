"""F8: one tenant fills the log of events, and the events of others are lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.attack.callers import repeat
from benchmarks.attack.kinds.streams import finished_job, large_spec
from benchmarks.attack.target import Attack, Progress, Target


async def fill(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Runs jobs with 12 MB of events each, one after the other, for ever.

    It begins to be measured once these events have more bytes than the log.
    """

    async def job() -> None:
        await finished_job(target, "attacker-1", large_spec())
        if progress.outcomes["OK"] >= sizes["jobs"]:
            progress.under_way()

    await repeat(progress, job)


ATTACKS = (
    Attack(
        "F8-eviction",
        "jobs with 12 MB of events each fill the log, here of 64 MiB",
        fill,
        {"jobs": 8},
        settings={"IMG2IMG_EVENTS_MAX_BYTES": str(64 * 2**20)},
        keeps_events=True,
    ),
)
