"""The estimated number of steps with strength as a noise level, compared with the engine's."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2img_server.domain.models import ModelInfo
from img2img_server.domain.noise_levels import NoiseLevels
from img2img_server.domain.params import JobParams
from img2img_server.domain.strength import StrengthMode, StrengthRule
from img2img_server.engine.diffusers.families import families
from img2img_server.engine.diffusers.noise_table import noise_levels
from img2img_server.engine.diffusers.schedules import Schedules, schedules_of
from img2img_server.engine.family import ModelFiles
from img2img_server.nats import codec
from tests.tiny_models import EPSILON, ZERO_SNR_V

LINSPACE = {**EPSILON, "beta_schedule": "linear", "timestep_spacing": "linspace"}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
# The configurations of the schedulers of published models, by family.
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "sd": (EPSILON, ZERO_SNR_V, LINSPACE),
    "sdxl": (EPSILON, {**EPSILON, "timestep_spacing": "trailing"}, EDM),
    "kolors": (EPSILON,),
    "lcm": (EPSILON, {**EPSILON, "original_inference_steps": 100}),
    "flux": (DYNAMIC, {"shift": 1.0}),
    "chroma": (DYNAMIC, {"shift": 1.0, "use_beta_sigmas": True}),
    "z_image": ({"shift": 3.0}, {"shift": 6.0}),
    "sd3": ({"shift": 3.0}, DYNAMIC),
    "qwen_image": (
        {
            **DYNAMIC,
            "max_shift": 0.9,
            "max_image_seq_len": 8192,
            "shift": 1.0,
            "shift_terminal": 0.02,
        },
        {**DYNAMIC, "base_shift": math.log(3), "max_shift": math.log(3), "shift": 1.0},
    ),
    "lumina2": ({"shift": 6.0},),
    "krea2": ({"use_dynamic_shifting": True},),
    "ernie_image": ({"shift": 3.0}, {**DYNAMIC, "time_shift_type": "linear"}),
    "sana_sprint": ({},),
}
CASES = [(family, index) for family, found in CONFIGS.items() for index in range(len(found))]
# Schedulers that run the model twice in a step, at least in one.
TWICE = ("heun", "pndm")


@cache
def model_of(family: str, index: int) -> tuple[ModelInfo, Schedules]:
    """Returns a model as a worker announces it, and the engine's schedules of it."""
    found = {each.name: each for each in families()}[family]
    files = ModelFiles({}, {"scheduler": CONFIGS[family][index]})
    schedules = schedules_of(found, files)
    info = ModelInfo(
        name="m",
        family=family,
        schedulers=found.offered(files.scheduler),
        default_num_inference_steps=found.num_inference_steps,
        default_guidance_scale=found.guidance_scale,
        native_size=found.native_size,
        max_side_pixels=found.max_side,
        strength_rule=found.strength_rule,
        scheduler_max_steps=found.scheduler_max_steps(files.scheduler),
    )
    announced = codec.encode(
        ModelInfo(**{**vars_of(info), "noise_levels": noise_levels(schedules, info)})
    )
    return codec.decode(announced, ModelInfo), schedules


def vars_of(info: ModelInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ModelInfo.__slots__}


def request(**options: Any) -> JobParams:
    return JobParams(prompt="p", strength_mode=StrengthMode.NOISE_LEVEL, **options)


def test_every_family_and_every_scheduler_has_a_table() -> None:
    assert CONFIGS.keys() == {family.name for family in families()}
    for case in CASES:
        model, _ = model_of(*case)
        names = [name for levels in model.noise_levels for name in levels.schedulers]
        assert sorted(names) == sorted(model.schedulers)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_about_as_many_steps_are_estimated_as_the_engine_runs(
    case: tuple[str, int], data: st.DataObject
) -> None:
    model, schedules = model_of(*case)
    scheduler = data.draw(st.sampled_from(model.schedulers))
    most = dict(model.scheduler_max_steps).get(scheduler, 50)
    steps = data.draw(st.integers(1, min(most, 50)))
    share = data.draw(st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.25, 0.5, 0.75, 1.0])))
    height, width = (data.draw(st.integers(16, 128)) * 16 for _ in "hw")
    params = request(
        strength=share, num_inference_steps=steps, scheduler=scheduler, height=height, width=width
    )

    run = schedules.get(scheduler, steps, share, height, width, StrengthMode.NOISE_LEVEL)
    found = model.denoising_steps(params)
    allowed = max(1, steps / 10) * (2 if scheduler in TWICE else 1)
    assert abs(found - len(run.steps)) <= allowed, (scheduler, steps, share, found, len(run.steps))
    assert len(run.steps) <= model.most_denoising_steps(params)


@pytest.mark.parametrize("case", [("sd", 0), ("z_image", 0), ("qwen_image", 0)], ids=str)
def test_more_steps_than_the_table_has_are_estimated(case: tuple[str, int]) -> None:
    model, schedules = model_of(*case)
    side, name = model.native_size, model.schedulers[0]
    for share in (0.02, 0.3, 0.6, 0.9, 1.0):
        params = request(strength=share, num_inference_steps=100, width=side, height=side)
        run = schedules.get(name, 100, share, side, side, StrengthMode.NOISE_LEVEL)
        assert abs(model.denoising_steps(params) - len(run.steps)) <= 10


def test_the_shift_for_the_size_counts() -> None:
    model, schedules = model_of("flux", 0)
    found = {}
    for side in (256, 512, 1024, 2048):
        params = request(strength=0.6, num_inference_steps=28, height=side, width=side)
        run = schedules.get("flow_match_euler", 28, 0.6, side, side, StrengthMode.NOISE_LEVEL)
        found[side] = model.denoising_steps(params)
        assert abs(found[side] - len(run.steps)) <= 1
    assert found[256] > 2 * found[1024] / 1.5 > 4 * found[2048] / 1.5


def test_few_steps_are_counted_exactly_at_the_native_size() -> None:
    for case in (("z_image", 0), ("sd3", 0), ("lumina2", 0)):
        model, schedules = model_of(*case)
        side = model.native_size
        for share in (0.05, 0.3, 0.55, 0.8, 0.95, 1.0):
            params = request(strength=share, num_inference_steps=4, width=side, height=side)
            run = schedules.get(model.schedulers[0], 4, share, side, side, StrengthMode.NOISE_LEVEL)
            assert model.denoising_steps(params) == len(run.steps)


def test_a_model_without_a_table_has_the_steps_of_the_same_share_of_steps() -> None:
    model, _ = model_of("z_image", 0)
    older = ModelInfo(**{**vars_of(model), "noise_levels": ()})
    params = request(strength=0.5, num_inference_steps=28)
    assert (older.denoising_steps(params), model.denoising_steps(params)) == (14, 7)
    assert (older.knows_steps(params), model.knows_steps(params)) == (False, True)
    # The engine may run any number of them.
    assert (older.most_denoising_steps(params), model.most_denoising_steps(params)) == (28, 10)
    assert older.denoising_steps(request(strength=0.01, num_inference_steps=4)) == 1


def test_a_table_changes_nothing_for_strength_as_a_share_of_steps() -> None:
    model, _ = model_of("z_image", 0)
    params = JobParams(prompt="p", strength=0.5, num_inference_steps=28)
    assert (model.denoising_steps(params), model.most_denoising_steps(params)) == (14, 14)
    for mode in StrengthMode:
        nothing = JobParams(prompt="p", strength=0.0, strength_mode=mode)
        assert (model.denoising_steps(nothing), model.pixel_steps(nothing)) == (0, 0)


def test_schedulers_with_the_same_levels_share_a_table() -> None:
    model, _ = model_of("sd", 0)
    groups = {levels.schedulers for levels in model.noise_levels}
    assert ("ddim", "euler", "euler_a", "heun") in groups
    assert all(not levels.by_size for levels in model.noise_levels)
    assert len(codec.encode(model)) < 2048


def test_a_scheduler_that_cannot_run_has_no_table() -> None:
    model, _ = model_of("sd", 0)
    (family,) = (each for each in families() if each.name == "sd")
    short = Schedules(family, {**EPSILON, "num_train_timesteps": 20})
    assert noise_levels(short, ModelInfo(**{**vars_of(model), "schedulers": ("ddim",)})) == ()


def test_a_consistency_model_runs_no_more_steps_than_lie_below_the_noise() -> None:
    levels = NoiseLevels(schedulers=("lcm",), schedules=((4, (-1382, -100, 0, 100, 1382)),))
    model = ModelInfo(
        name="m",
        family="lcm",
        schedulers=("lcm",),
        default_num_inference_steps=4,
        default_guidance_scale=1.0,
        strength_rule=StrengthRule.ALL,
        noise_levels=(levels,),
    )
    found = [
        model.denoising_steps(request(strength=share, num_inference_steps=3))
        for share in (0.01, 0.5, 0.73, 1.0)
    ]
    assert found == [1, 2, 3, 3]


def test_the_first_step_of_a_noise_level_runs_the_model_once() -> None:
    model, schedules = model_of("sd", 0)
    for scheduler, steps in (("heun", 12), ("pndm", 7)):
        params = request(strength=0.8, num_inference_steps=12, scheduler=scheduler)
        run = schedules.get(scheduler, 12, 0.8, 512, 512, StrengthMode.NOISE_LEVEL)
        assert model.denoising_steps(params) == len(run.steps) == steps
