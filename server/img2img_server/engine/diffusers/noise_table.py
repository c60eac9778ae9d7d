"""Tables of a model's schedules, from which the api estimates how many steps run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Final

import numpy as np

from img2img_server.domain.models import ModelInfo
from img2img_server.domain.noise_levels import NoiseLevels, log_odds
from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.diffusers.schedules import Schedules

# The schedules that a table has, and the largest number of places of each: estimates for 1 to 50
# steps then differ from the engine by 1 step at most, or by a tenth of many steps.
_NUMBERS: Final = (4, 6, 15, 50)
_PLACES: Final = 16
_SMALLEST_SIDE: Final = 256
# Log-odds beyond these have no exact difference between sizes.
_EXACT: Final = 400


def noise_levels(schedules: Schedules, model: ModelInfo) -> tuple[NoiseLevels, ...]:
    """Returns the tables of a model; schedulers with the same levels share one. A scheduler that
    cannot run has none.
    """
    most = dict(model.scheduler_max_steps)
    found: dict[NoiseLevels, list[str]] = {}
    for name in model.schedulers:
        try:
            tables = _schedules(schedules, model, name, most.get(name, _NUMBERS[-1]))
            sizes = _by_size(schedules, model, name, tables[-1][0])
        except (ValueError, NotImplementedError):  # Requests with it fail and say why.
            continue
        levels = NoiseLevels(schedulers=(), schedules=tables, by_size=sizes)
        found.setdefault(levels, []).append(name)
    return tuple(replace(levels, schedulers=tuple(names)) for levels, names in found.items())


def _schedules(
    schedules: Schedules, model: ModelInfo, name: str, most: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Returns the levels of a scheduler for several numbers of steps.

    Args:
        most: The largest number of steps of the scheduler.
    """
    numbers: tuple[int, ...]
    if model.strength_rule is StrengthRule.ALL:
        # A run is a part of the longest schedule, which needs more places.
        numbers, places = (most,), _NUMBERS[-1]
    else:
        places = _PLACES
        last = min(most, _NUMBERS[-1])
        numbers = (*(number for number in _NUMBERS if number < last), last)
    side = model.native_size
    return tuple(
        (number, _spaced(_shares(schedules, name, number, side), places)) for number in numbers
    )


def _shares(schedules: Schedules, name: str, number: int, side: int) -> tuple[float, ...]:
    """Returns the shares of noise for square images. Raises ValueError."""
    shares = schedules.noise_shares(name, number, side, side)
    if not all(map(math.isfinite, shares)):
        raise ValueError(f"the noise levels of {name} are not finite")
    return shares


def _spaced(shares: Sequence[float], most: int) -> tuple[int, ...]:
    """Returns the log-odds of shares of noise at equally spaced places, of which there are at most
    this number and the end of the last step.
    """
    known = [0.0, *shares]
    if len(shares) > most:
        places = np.linspace(0, len(shares), most + 1)
        known = np.interp(places, np.arange(len(known)), known).tolist()
    return tuple(map(log_odds, known))


def _by_size(
    schedules: Schedules, model: ModelInfo, name: str, number: int
) -> tuple[tuple[int, int], ...]:
    """Returns the differences of the levels of other sizes from those of the native size."""
    sides = sorted({_SMALLEST_SIDE, model.native_size, model.max_side_pixels})
    native = list(map(log_odds, _shares(schedules, name, number, model.native_size)))
    differences = []
    for side in sides:
        found = map(log_odds, _shares(schedules, name, number, side))
        pairs = zip(found, native, strict=True)
        exact = [one - other for one, other in pairs if max(abs(one), abs(other)) < _EXACT]
        differences.append((side**2, round(median(exact)) if exact else 0))
    return tuple(differences) if any(difference for _, difference in differences) else ()
