"""Estimates how many steps run with strength as a noise level.

Only the worker knows the schedules of its models, so it announces a small table of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_LARGEST: Final = 1382  # the log-odds of shares that count as 1, in hundredths
_SAME_SHARE: Final = 1e-6  # Shares with a smaller difference count as equal, as in the engine.
_SAME_PLACE: Final = 0.02  # Part of a step that may be an error of the table.


def log_odds(share: float) -> int:
    """Returns ln(share / (1 - share)) in hundredths, at most 1382 and at least -1382."""
    share = min(max(share, _SAME_SHARE), 1 - _SAME_SHARE)
    return round(100 * math.log(share / (1 - share)))


def _share(odds: float) -> float:
    """Returns the share of noise with these log-odds."""
    if abs(odds) >= _LARGEST:
        return 1.0 if odds > 0 else 0.0
    return 1 / (1 + math.exp(-odds / 100))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseLevels:
    """The shares of noise in some schedules of a model.

    Shares are log-odds in hundredths: these keep small differences near 0 and 1, and a schedule
    that is shifted for another size differs by a constant.

    Attributes:
        schedulers: The names of the schedulers with these levels.
        schedules: Numbers of steps, rising, each with the levels at equally spaced places of its
            schedule for images of the native size: from the end of the last step, where no noise is
            left, to the beginning of the first one.
        by_size: Numbers of pixels, rising, each with the difference of the levels of this size from
            those of the native size. Empty: the levels are the same for all sizes.
    """

    schedulers: tuple[str, ...]
    schedules: tuple[tuple[int, tuple[int, ...]], ...]
    by_size: tuple[tuple[int, int], ...] = ()

    def steps(self, share: float, num_inference_steps: int, pixels: int) -> int:
        """Returns how many steps run from a share of noise, which is above 0.

        It differs from the engine's number by 1 at most, or by a tenth of many steps.
        """
        place = self._place(self._native_share(share, pixels), num_inference_steps)
        run = math.ceil(num_inference_steps * place - _SAME_PLACE)
        return min(max(run, 1), num_inference_steps)

    def places_below(self, share: float) -> int:
        """Returns how many steps of the longest schedule begin below a share of noise, at least
        1.
        """
        steps, levels = self.schedules[-1]
        return max(1, round(steps * _place(levels, share)))

    def _native_share(self, share: float, pixels: int) -> float:
        """Returns the share at the same place of the schedule for the native size."""
        if not self.by_size or not 0 < share < 1:
            return share
        sizes = [size for size, _ in self.by_size]
        place = min(max(bisect_left(sizes, pixels), 1), len(sizes) - 1)
        (small, low), (large, high) = self.by_size[place - 1 : place + 1]
        part = min(max((pixels - small) / (large - small), 0.0), 1.0)
        return _share(100 * math.log(share / (1 - share)) - (low + part * (high - low)))

    def _place(self, share: float, num_inference_steps: int) -> float:
        """Returns the place of a share in a schedule of any number of steps, 0 to 1.

        The place is nearly linear in 1 / num_inference_steps: schedulers differ in whether the
        first step and the last one are at the ends of the training's timesteps.
        """
        numbers = [number for number, _ in self.schedules]
        if len(numbers) == 1:
            return _place(self.schedules[0][1], share)
        last = min(max(bisect_left(numbers, num_inference_steps), 1), len(numbers) - 1)
        (few, of_few), (many, of_many) = self.schedules[last - 1 : last + 1]
        weight = (1 / num_inference_steps - 1 / many) / (1 / few - 1 / many)
        return weight * _place(of_few, share) + (1 - weight) * _place(of_many, share)


def _place(levels: Sequence[int], share: float) -> float:
    """Returns where a share of noise is between equally spaced levels, 0 to 1."""
    shares = [_share(odds) for odds in levels]
    after = bisect_left(shares, share - _SAME_SHARE)
    if after in (0, len(shares)):
        return 0.0 if after == 0 else 1.0
    low, high = shares[after - 1 : after + 1]
    return (after - 1 + (share - low) / (high - low)) / (len(shares) - 1)
