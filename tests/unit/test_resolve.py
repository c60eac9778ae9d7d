"""Defaults of the model, the least number of steps, and the warnings about both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img_server.domain.models import Guidance, ModelInfo
from img2img_server.domain.noise_levels import NoiseLevels
from img2img_server.domain.params import JobParams, Limits, Lora
from img2img_server.domain.resolve import complete, fit_size, resolve
from img2img_server.domain.strength import StrengthMode, StrengthRule
from img2img_server.domain.warnings import join_warnings

FLOOR = StrengthRule.FLOOR
MODEL = ModelInfo(
    name="m",
    family="sd",
    schedulers=("ddim", "euler"),
    default_num_inference_steps=20,
    default_guidance_scale=7.5,
    default_strength=0.6,
)
CONSISTENCY = replace(
    MODEL,
    schedulers=("lcm",),
    strength_rule=StrengthRule.ALL,
    default_num_inference_steps=4,
    scheduler_max_steps=(("lcm", 50),),
)
STRENGTHS = st.floats(0.0, 1.0, exclude_min=True)


def resolved(model: ModelInfo = MODEL, **fields: Any) -> tuple[JobParams, list[str]]:
    params = complete({"prompt": "p", **fields}, model, Limits())
    return resolve(params, model, model.limits(Limits()))


@given(STRENGTHS, st.integers(1, 100))
def test_steps_are_raised_to_the_smallest_number_for_which_one_runs(
    strength: float, steps: int
) -> None:
    params, warnings = resolved(strength=strength, num_inference_steps=steps)
    used = params.num_inference_steps
    if FLOOR.denoising_steps(strength, steps):
        assert (used, warnings) == (steps, [])
    elif FLOOR.denoising_steps(strength, 100):
        assert FLOOR.denoising_steps(strength, used) == 1
        assert FLOOR.denoising_steps(strength, used - 1) == 0
        assert warnings == [
            f"num_inference_steps was raised from {steps} to {used} so that one step runs at "
            f"strength {strength}."
        ]
    else:
        assert used == steps
        assert warnings[0].startswith(f"At strength {strength} no step runs, not even with")


@pytest.mark.parametrize(
    ("strength", "steps", "used"), [(0.7, 1, 2), (0.99, 1, 2), (0.04, 20, 25), (1.0, 1, 1)]
)
def test_steps_of_known_requests(strength: float, steps: int, used: int) -> None:
    params, warnings = resolved(strength=strength, num_inference_steps=steps)
    assert params.num_inference_steps == used
    assert bool(warnings) is (used != steps)


@pytest.mark.parametrize(("most", "least"), [(100, 0.01), (49, 0.0205), (3, 0.3334), (1, 1.0)])
def test_the_least_strength_that_is_named_runs_a_step(most: int, least: float) -> None:
    model = replace(MODEL, max_num_inference_steps=most, default_num_inference_steps=1)
    params, warnings = resolved(model, strength=0.0001)
    assert params.num_inference_steps == 1
    assert warnings == [
        f"At strength 0.0001 no step runs, not even with num_inference_steps {most}, the largest "
        "that the model allows: the prepared init image is returned. The least strength at which "
        f"a step runs is {least:g}."
    ]
    assert FLOOR.denoising_steps(least, most) >= 1


def test_what_is_open_is_the_models_own() -> None:
    params, warnings = resolved()
    assert (params.num_inference_steps, params.guidance_scale, params.scheduler) == (
        20,
        7.5,
        "ddim",
    )
    assert warnings == []
    narrow = replace(MODEL, scheduler_max_steps=(("ddim", 10),))
    assert resolved(narrow)[0].num_inference_steps == 10, "the scheduler allows no more"
    params, _ = resolved(num_inference_steps=3, guidance_scale=0.0, scheduler="euler")
    assert (params.num_inference_steps, params.guidance_scale, params.scheduler) == (
        3,
        0.0,
        "euler",
    )


@pytest.mark.parametrize(
    ("fields", "reported"),
    [
        (
            {"negative_prompt": "n", "guidance_scale": 1.0},
            "negative_prompt has no effect: guidance_scale is 1, and only above 1 is it used.",
        ),
        ({"negative_prompt": "n", "guidance_scale": 1.1}, ""),
        (
            {"loras": (Lora("ink", 0.5), Lora("oil", 0.0))},
            "The LoRA oil has no effect at scale 0.",
        ),
        (
            {"prompt_weights": True},
            "prompt_weights has no effect: the model m reads brackets, numbers in them and BREAK "
            "as text.",
        ),
        ({"clip_skip": 1}, "clip_skip has no effect: the model m does not take it."),
        ({"loras": (Lora("ink", 0.5), Lora("oil"))}, ""),
        (
            {"preview_interval_steps": 12},
            "No preview is sent: preview_interval_steps is 12 and 12 steps run.",
        ),
        ({"preview_interval_steps": 11}, ""),
        ({"preview_interval_steps": 12, "scheduler": "heun"}, ""),
        (
            {"preview_interval_steps": 23, "scheduler": "heun"},
            "No preview is sent: preview_interval_steps is 23 and 23 steps run.",
        ),
        (
            {"preview_interval_steps": 1, "num_inference_steps": 2},
            "No preview is sent: preview_interval_steps is 1 and 1 step runs.",
        ),
        (
            {"strength": 0.0},
            "At strength 0 no step runs: the prepared init image is returned.",
        ),
    ],
    ids=str,
)
def test_options_without_effect_are_named(fields: dict[str, Any], reported: str) -> None:
    assert resolved(**{"strength": 0.6, **fields})[1] == ([reported] if reported else [])


def test_syntax_of_prompts_that_is_read_as_text_is_named() -> None:
    model = replace(MODEL, takes_prompt_weights=True)
    prompts = {"prompt": "a (red:1.3", "negative_prompt": "(fog:1,3)", "guidance_scale": 2.0}
    assert resolved(model, prompt_weights=True, **prompts)[1] == [
        "In prompt, brackets without their partner are text: (.",
        "In negative_prompt, weights that are no numbers such as 1.3 are text (1,3).",
    ]
    assert resolved(model, **prompts)[1] == []


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_a_negative_prompt_that_the_model_cannot_take_is_named(scale: float) -> None:
    model = replace(MODEL, takes_negative_prompt=False, guidance=Guidance.EMBEDDED)
    assert resolved(model, negative_prompt="n", guidance_scale=scale)[1] == [
        "negative_prompt has no effect: the model m uses none."
    ]


def test_a_guidance_scale_without_effect_is_named() -> None:
    model = replace(MODEL, guidance=Guidance.NONE)
    assert resolved(model)[1] == []
    assert resolved(model, guidance_scale=3.0)[1] == [
        "guidance_scale has no effect: the model m does not take it."
    ]
    assert resolved(replace(model, guidance=Guidance.EMBEDDED), guidance_scale=3.0)[1] == []


@pytest.mark.parametrize(
    ("fields", "reported"),
    [
        ({"negative_prompt": "n", "true_cfg_scale": 2.0}, ""),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale has no effect without negative_prompt."),
        (
            {"negative_prompt": "n"},
            "negative_prompt has no effect: true_cfg_scale is 1, and only above 1 is it used.",
        ),
        (
            {"negative_prompt": "n", "true_cfg_scale": 0.0},
            "negative_prompt has no effect: true_cfg_scale is 0, and only above 1 is it used.",
        ),
    ],
    ids=["both", "no negative prompt", "no scale", "scale 0"],
)
def test_a_model_with_its_own_guidance_takes_a_negative_prompt_with_true_cfg_scale(
    fields: dict[str, Any], reported: str
) -> None:
    for guidance in (Guidance.EMBEDDED, Guidance.NONE):
        params, warnings = resolved(replace(MODEL, guidance=guidance), **fields)
        assert warnings == ([reported] if reported else [])
        assert replace(MODEL, guidance=guidance).forwards(params) == (1 if reported else 2)


def test_true_cfg_scale_is_named_for_other_models() -> None:
    sentence = "true_cfg_scale has no effect: the model m does not take it."
    assert resolved(true_cfg_scale=2.0)[1] == [sentence]
    lcm = replace(MODEL, guidance=Guidance.EMBEDDED, takes_negative_prompt=False)
    assert resolved(lcm, true_cfg_scale=2.0)[1] == [sentence]
    assert lcm.forwards(JobParams(prompt="p", negative_prompt="n", true_cfg_scale=2.0)) == 1


def test_warnings_are_joined_by_spaces_each_once() -> None:
    assert join_warnings("One.", "", "Two.", "One.") == "One. Two."
    assert join_warnings() == ""


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (0, [0, 1, 2]),
        (2**32 - 2, [2**32 - 2, 2**32 - 1, 0]),
        (2**32, [2**32, 2**32 + 1, 2**32 + 2]),
        (2**63 - 2, [2**63 - 2, 2**63 - 1, 0]),
    ],
)
def test_samples_use_the_seeds_that_follow(seed: int, seeds: list[int]) -> None:
    params = JobParams(prompt="p", seed=seed, samples=3)
    assert [params.sample_seed(index) for index in range(3)] == seeds


@pytest.mark.parametrize(
    ("strength", "steps", "used"), [(0.5, 40, 25), (0.5, 25, 25), (0.06, 4, 3), (1.0, 50, 50)]
)
def test_a_consistency_model_runs_all_steps_that_its_schedule_has(
    strength: float, steps: int, used: int
) -> None:
    params, warnings = resolved(CONSISTENCY, strength=strength, num_inference_steps=steps)
    assert params.num_inference_steps == used
    assert StrengthRule.ALL.denoising_steps(strength, used) == used
    lowered = f"num_inference_steps was lowered from {steps} to {used}, the largest number that the"
    assert [warning.startswith(lowered) for warning in warnings] == [True] * (used != steps)


def test_a_consistency_model_returns_the_init_image_below_its_schedule() -> None:
    params, warnings = resolved(CONSISTENCY, strength=0.01)
    assert params.strength == 0.0
    assert warnings[0].endswith("The least strength at which a step runs is 0.02.")


def test_steps_stay_as_they_are_when_strength_is_a_noise_level() -> None:
    params, warnings = resolved(
        strength=0.1, num_inference_steps=2, strength_mode=StrengthMode.NOISE_LEVEL
    )
    assert (params.num_inference_steps, warnings) == (2, [])


# 5 of 20 steps begin below half of the noise.
LEVELS = NoiseLevels(schedulers=("ddim",), schedules=((4, (-1382, 0, 110, 220, 1382)),))
_NO_STEP_REACHES = "No preview is sent: no step before the last one reaches preview_interval_steps"


@pytest.mark.parametrize(
    ("interval", "levels", "reported"),
    [
        (6, (LEVELS,), False),  # The table may be wrong by 2 of 20 steps.
        (7, (LEVELS,), True),
        (19, (), False),
        (20, (), True),  # More steps than num_inference_steps cannot run.
    ],
)
def test_a_preview_that_surely_does_not_come_is_named_for_a_noise_level(
    interval: int, levels: tuple[NoiseLevels, ...], reported: bool
) -> None:
    _, warnings = resolved(
        replace(MODEL, noise_levels=levels),
        strength=0.5,
        num_inference_steps=20,
        strength_mode=StrengthMode.NOISE_LEVEL,
        preview_interval_steps=interval,
    )
    assert warnings == ([f"{_NO_STEP_REACHES} {interval}."] if reported else [])


@pytest.mark.parametrize(
    ("given", "image", "size"),
    [
        ({}, (1000, 1000), (1024, 1024)),
        ({}, (3000, 2000), (1256, 840)),
        ({}, (2000, 3000), (840, 1256)),
        ({}, (9000, 1000), (1536, 344)),
        ({"width": 768}, (3000, 2000), (768, 512)),
        ({"height": 512}, (3000, 2000), (768, 512)),
        ({"width": 256}, (3000, 1000), (256, 256)),
    ],
)
def test_a_missing_side_follows_the_init_image(
    given: dict[str, int], image: tuple[int, int], size: tuple[int, int]
) -> None:
    assert fit_size(given, 1024, Limits(max_side_pixels=1536), image) == size


def test_missing_sides_are_multiples_of_the_models() -> None:
    width, height = fit_size({}, 1024, Limits(side_multiple=32), (1000, 999))
    assert (width % 32, height % 32) == (0, 0)
