"""The number of steps at a strength is equal to that of the stock pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import FluxImg2ImgPipeline, StableDiffusionImg2ImgPipeline
from hypothesis import example, given
from hypothesis import strategies as st

from img2img_server.domain.strength import StrengthRule

PIPELINES: dict[StrengthRule, Any] = {
    StrengthRule.FLOOR: StableDiffusionImg2ImgPipeline,
    StrengthRule.CEIL: FluxImg2ImgPipeline,
}
STRENGTHS = st.floats(0.0, 1.0, exclude_min=True)


def stock_steps(rule: StrengthRule, strength: float, steps: int) -> int:
    """Returns the number of steps that the pipeline of diffusers runs."""
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(order=1, timesteps=range(steps)))
    timesteps, _ = PIPELINES[rule].get_timesteps(pipeline, steps, strength, "cpu")
    return len(timesteps)


@pytest.mark.parametrize("rule", PIPELINES)
@given(strength=STRENGTHS, steps=st.integers(1, 1000))
@example(strength=0.29, steps=100)
@example(strength=0.28, steps=25)
@example(strength=0.14, steps=50)
def test_as_many_steps_run_as_in_diffusers(rule: StrengthRule, strength: float, steps: int) -> None:
    assert rule.denoising_steps(strength, steps) == stock_steps(rule, strength, steps)


@pytest.mark.parametrize(
    ("strength", "steps", "floor", "ceil"),
    [(0.0, 20, 0, 0), (0.7, 6, 4, 5), (0.6, 8, 4, 5), (0.6, 28, 16, 17), (0.14, 50, 7, 7)],
)
def test_known_requests(strength: float, steps: int, floor: int, ceil: int) -> None:
    assert StrengthRule.FLOOR.denoising_steps(strength, steps) == floor
    assert StrengthRule.CEIL.denoising_steps(strength, steps) == ceil


@pytest.mark.parametrize("rule", StrengthRule)
@given(strength=STRENGTHS)
def test_the_least_number_of_steps_is_the_smallest_that_runs_one(
    rule: StrengthRule, strength: float
) -> None:
    runs = [steps for steps in range(1, 101) if rule.denoising_steps(strength, steps)]
    assert rule.least_inference_steps(strength, 100) == (runs[0] if runs else None)


def test_the_product_is_rounded_as_floating_point_numbers_are() -> None:
    assert StrengthRule.FLOOR.denoising_steps(0.29, 100) == 28
    assert StrengthRule.FLOOR.least_inference_steps(0.29, 100) == 4
