"""Splits the time of a job among its stages, so that their seconds add up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

# While several stages of a job run at the same time, the first one of these gets the time.
STAGE_ORDER: Final = (
    "denoise",
    "encode",
    "decode",
    "prepare",
    "safety",
    "image_encode",
    "upload",
    "paused",
    "held",
)
_RANKS: Final = {stage: rank for rank, stage in enumerate(STAGE_ORDER)}


@dataclass(frozen=True, slots=True)
class Span:
    """The time of one stage, in monotonic seconds."""

    stage: str
    began: float
    ended: float


def seconds_by_stage(spans: Iterable[Span]) -> dict[str, float]:
    """Returns the seconds of each stage; each moment counts for one stage, by STAGE_ORDER.

    Moments in no span count for no stage.
    """
    changes: dict[float, list[tuple[int, str]]] = defaultdict(list)
    for span in spans:
        if span.ended > span.began:
            changes[span.began].append((1, span.stage))
            changes[span.ended].append((-1, span.stage))
    found: dict[str, float] = defaultdict(float)
    open_spans: dict[str, int] = defaultdict(int)
    before = 0.0
    for moment in sorted(changes):
        if running := [stage for stage, number in open_spans.items() if number]:
            found[min(running, key=_RANKS.__getitem__)] += moment - before
        for change, stage in changes[moment]:
            open_spans[stage] += change
        before = moment
    return dict(found)
