"""Computes the number of denoising steps at a strength, by the rules of diffusers' stock
pipelines.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from enum import StrEnum


class StrengthMode(StrEnum):
    """Whether strength is the share of steps that run or the share of noise at the first step."""

    STEPS = "steps"
    NOISE_LEVEL = "noise_level"


class StrengthRule(StrEnum):
    """The rounding of steps x strength in a model family: FLOOR in UNet pipelines, CEIL in
    flow-matching pipelines.

    With ALL, every step runs, and strength is the place in the schedule where the first one begins,
    as in latent consistency models.

    CEIL uses the same float expression as the pipelines: `math.ceil` of the product would give 8
    for 50 steps at strength 0.14, but 7 steps run.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    ALL = "all"

    def denoising_steps(self, strength: float, num_inference_steps: int) -> int:
        """Returns the number of steps of the schedule that run."""
        assert 0.0 <= strength <= 1.0
        assert math.isfinite(strength)
        if self is StrengthRule.ALL:
            return num_inference_steps if strength else 0
        if self is StrengthRule.FLOOR:
            return min(int(num_inference_steps * strength), num_inference_steps)
        run = min(num_inference_steps * strength, num_inference_steps)
        return num_inference_steps - int(max(num_inference_steps - run, 0))

    def least_inference_steps(self, strength: float, most: int) -> int | None:
        """Returns the smallest num_inference_steps up to `most` for which a step runs, or None."""
        schedules = range(1, most + 1)
        place = bisect_left(schedules, 1, key=lambda steps: self.denoising_steps(strength, steps))
        return schedules[place] if place < len(schedules) else None
