"""Compares our linear update with the schedulers of diffusers, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import calculate_shift
from torch import Tensor

from img2img_server.domain.schedulers import (
    SPELLINGS,
    model_runs,
    offered_name,
    scheduler_name,
)
from img2img_server.domain.strength import StrengthMode
from img2img_server.engine.diffusers.families.base import Family, FlowFamily
from img2img_server.engine.diffusers.families.lcm import LatentConsistency
from img2img_server.engine.diffusers.families.sana_sprint import SanaSprint
from img2img_server.engine.diffusers.families.sd import StableDiffusion
from img2img_server.engine.diffusers.samplers import (
    DIFFUSION_SAMPLERS,
    EDM_SAMPLERS,
    FLOW_SAMPLERS,
    SAMPLERS,
    own_sampler,
)
from img2img_server.engine.diffusers.schedules import Schedules, _parts, make_scheduler
from img2img_server.engine.sampler import (
    Schedule,
    advance,
    coefficient_table,
    draw_noise,
    scale_input,
)

SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
ZERO_SNR_V = {
    **SD,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
}
TRAINED_BETAS = {
    **SD,
    "beta_schedule": "linear",
    "trained_betas": torch.linspace(0.0001, 0.02, 1000).tolist(),
    "timestep_spacing": "linspace",
}
CONFIGS = {"sd": SD, "zero-snr-v": ZERO_SNR_V, "trained-betas": TRAINED_BETAS}
RUNS = [(1, 1.0), (4, 0.3), (5, 0.5), (7, 0.95), (13, 1.0), (20, 0.6), (30, 0.75)]
SIZE = (48, 40)
SHAPE = (1, 4, 6, 5)
LIKE = torch.zeros(SHAPE)


def schedules_of(config: dict[str, Any]) -> Schedules:
    return Schedules(StableDiffusion(), config)


def model(latents: Tensor, timestep: float) -> Tensor:
    """Stands for a network: not linear, and dependent on the timestep."""
    return torch.tanh(latents.flip(3) * 0.8 + timestep / 1000) * 1.5


def stock(name: str, config: dict[str, Any], steps: int, strength: float, seed: int) -> Tensor:
    """Runs the loop of StableDiffusionImg2ImgPipeline with the stock scheduler."""
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(steps)
    start = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(SHAPE, generator=generator)
    noise = torch.randn(SHAPE, generator=generator)
    timesteps = scheduler.timesteps[start:]
    latents = scheduler.add_noise(image, noise, timesteps[:1])
    options = {"generator": generator, "eta": 0.0}
    taken = signature(scheduler.step).parameters.keys() & options.keys()
    options = {name: options[name] for name in taken}
    for timestep in timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        output = model(seen, float(timestep))
        latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
    return latents


def ours(runs: list[tuple[Schedule, int]]) -> list[Tensor]:
    """Runs all schedules in one batch, from which rows leave when they end."""
    generators = [torch.Generator().manual_seed(seed) for _, seed in runs]
    images = [draw_noise(generator, LIKE) for generator in generators]
    noises = [draw_noise(generator, LIKE) for generator in generators]
    slots = [
        (schedule.init_signal * image + schedule.init_noise * noise,)
        for (schedule, _), image, noise in zip(runs, images, noises, strict=True)
    ]
    tables = [coefficient_table(schedule) for schedule, _ in runs]
    for index in range(max(len(schedule.steps) for schedule, _ in runs)):
        rows = [row for row, (schedule, _) in enumerate(runs) if index < len(schedule.steps)]
        steps = [runs[row][0].steps[index] for row in rows]
        coefficients = torch.stack([tables[row][index] for row in rows])
        seen = scale_input([slots[row][0] for row in rows], coefficients)
        output = [model(x, step.timestep) for x, step in zip(seen, steps, strict=True)]
        noise = [
            draw_noise(generators[row], LIKE) if step.draws_noise else None
            for row, step in zip(rows, steps, strict=True)
        ]
        found = advance(steps, [slots[row] for row in rows], output, noise, coefficients)
        for row, (new, _) in zip(rows, found, strict=True):
            slots[row] = new
    return [kept[0] for kept in slots]


@pytest.mark.parametrize("config", CONFIGS)
def test_all_samplers_in_one_batch_follow_their_stock_scheduler(config: str) -> None:
    schedules = schedules_of(CONFIGS[config])
    cases = [(name, *run) for name in DIFFUSION_SAMPLERS for run in RUNS]
    batch = [(schedules.get(*case, *SIZE), seed) for seed, case in enumerate(cases)]

    for seed, (case, result) in enumerate(zip(cases, ours(batch), strict=True)):
        expected = stock(case[0], CONFIGS[config], case[1], case[2], seed)
        # Latents of a clean image have a standard deviation of about 1; 0.004 is half a grey level
        # of 255.
        torch.testing.assert_close(result, expected, atol=0.004, rtol=0.001, msg=str(case))


FLOW_CONFIGS: dict[str, dict[str, Any]] = {
    "no shift": {},
    "static shift": {"shift": 3.0},
    "dynamic shift": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "stretched to a terminal": {
        "use_dynamic_shifting": True,
        "shift_terminal": 0.02,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
    },
    "stochastic": {"shift": 3.0, "stochastic_sampling": True},
}
FLOW_RUNS = [(1, 1.0), (8, 0.6), (25, 0.28), (50, 0.14), (28, 0.6), (21, 0.05), (9, 0.97)]


def flow_name(config: dict[str, Any]) -> str:
    return own_sampler({"_class_name": "FlowMatchEulerDiscreteScheduler", **config})


def stock_flow(config: dict[str, Any], steps: int, strength: float, seed: int) -> Tensor:
    """Runs the loop of FluxImg2ImgPipeline with the stock scheduler."""
    scheduler = make_scheduler(flow_name(config), config)
    mu = calculate_shift(
        SIZE[0] // 16 * (SIZE[1] // 16),
        scheduler.config.base_image_seq_len,
        scheduler.config.max_image_seq_len,
        scheduler.config.base_shift,
        scheduler.config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    pipeline = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = FluxImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(SHAPE, generator=generator)
    noise = torch.randn(SHAPE, generator=generator)
    latents = scheduler.scale_noise(image, timesteps[:1], noise)
    for timestep in timesteps:
        output = model(latents, float(timestep))
        latents = scheduler.step(output, timestep, latents, generator=generator, return_dict=False)[
            0
        ]
    return latents


@pytest.mark.parametrize("config", FLOW_CONFIGS)
def test_flow_matching_follows_its_stock_scheduler(config: str) -> None:
    schedules = Schedules(FlowFamily(), FLOW_CONFIGS[config])
    runs = FLOW_RUNS if "shift_terminal" not in FLOW_CONFIGS[config] else FLOW_RUNS[1:]
    batch = [
        (schedules.get(flow_name(FLOW_CONFIGS[config]), steps, strength, *SIZE), seed)
        for seed, (steps, strength) in enumerate(runs)
    ]

    for seed, (run, result) in enumerate(zip(runs, ours(batch), strict=True)):
        expected = stock_flow(FLOW_CONFIGS[config], *run, seed)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4, msg=str(run))


def test_a_single_step_that_stock_diffusers_turns_into_no_number_is_not_stretched() -> None:
    schedules = Schedules(FlowFamily(), FLOW_CONFIGS["stretched to a terminal"])
    for mode in StrengthMode:
        found = schedules.get("flow_match_euler", 1, 1.0, *SIZE, mode)
        assert (found.init_signal, found.init_noise, len(found.steps)) == (0.0, 1.0, 1)


def test_a_schedule_depends_on_the_size_only_with_a_dynamic_shift() -> None:
    for config, is_same in (("static shift", True), ("dynamic shift", False)):
        schedules = Schedules(FlowFamily(), FLOW_CONFIGS[config])
        small, large = (schedules.get("flow_match_euler", 8, 0.6, side, side) for side in (64, 512))
        assert (small == large) is is_same


def test_noise_falls_to_nothing_in_the_last_step() -> None:
    schedules = schedules_of(SD)
    for name in DIFFUSION_SAMPLERS:
        sigmas = [step.sigma_after for step in schedules.get(name, 10, 0.8, *SIZE).steps]
        assert len(sigmas) == model_runs(name, 8)
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[-1] == 0.0


@pytest.mark.parametrize(("steps", "strength"), [(10, 0.0), (4, 0.2)])
def test_a_strength_below_one_step_leaves_the_image_as_it_is(steps: int, strength: float) -> None:
    schedule = schedules_of(SD).get("ddim", steps, strength, *SIZE)

    assert schedule == Schedule(init_signal=1.0, init_noise=0.0, steps=())


@pytest.mark.parametrize(("name", "steps"), [("lcm", 60), ("ddim", 1000)])
def test_more_steps_than_a_scheduler_can_run_are_refused(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match=f"scheduler {name} cannot run {steps} steps"):
        schedules_of(SD).get(name, steps, 1.0, *SIZE)


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no scheduler nonsense"):
        schedules_of(SD).get("nonsense", 4, 1.0, *SIZE)


def test_a_schedule_is_derived_once() -> None:
    schedules = schedules_of(SD)

    # Both strengths run the last 3 of 10 steps.
    assert schedules.get("euler", 10, 0.3, *SIZE) is schedules.get("euler", 10, 0.35, *SIZE)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"),
        ("dpmpp_2m_sde", "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("Euler a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("K_EULER", "euler"),
        ("EulerDiscrete", "euler"),
        ("UniPC", "unipc"),
        ("uni_pc", "unipc"),
        ("PLMS", "pndm"),
        ("HeunDiscreteScheduler", "heun"),
        ("FlowMatchEulerDiscreteScheduler", "flow_match_euler"),
        ("DPM++ 2S a", "DPM++ 2S a"),
        ("DPM2", "DPM2"),
        ("k_euler_a", "euler_a"),
        ("Euler Karras", "Euler Karras"),
        ("Euler \u00e5", "Euler \u00e5"),
    ],
)
def test_a_scheduler_has_one_name_for_all_its_spellings(text: str, name: str) -> None:
    assert scheduler_name(text) == name


@pytest.mark.parametrize(
    ("text", "offered", "name"),
    [
        ("Euler", DIFFUSION_SAMPLERS, "euler"),
        ("Euler", FLOW_SAMPLERS, "flow_match_euler"),
        ("EulerDiscreteScheduler", EDM_SAMPLERS, "edm_euler"),
        ("DPM++ 2M", EDM_SAMPLERS, "edm_dpmpp_2m"),
        ("DPM++ 2M", FLOW_SAMPLERS, "dpmpp_2m"),
        ("Euler a", FLOW_SAMPLERS, "euler_a"),
        ("Euler", ("scm",), "euler"),
        ("Euler", (), "euler"),
    ],
)
def test_a_spelling_means_the_sampler_of_the_models_kind(
    text: str, offered: tuple[str, ...], name: str
) -> None:
    assert offered_name(text, offered) == name


def test_every_sampler_has_its_spellings() -> None:
    assert SPELLINGS.keys() == SAMPLERS.keys()
    for name, sampler in SAMPLERS.items():
        assert scheduler_name(name) == name
        assert SAMPLERS[scheduler_name(sampler.class_name)].class_name == sampler.class_name


DPM = {"_class_name": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DPM, "dpmpp_2m"),
        (DPM | {"use_karras_sigmas": True}, "dpmpp_2m_karras"),
        (DPM | {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        (DPM | {"algorithm_type": "dpmsolver"}, ""),
        (DPM | {"solver_order": 3}, ""),
        ({"_class_name": "KDPM2DiscreteScheduler"}, ""),
    ],
)
def test_the_configuration_of_a_scheduler_decides_its_name(
    config: dict[str, Any], name: str
) -> None:
    assert own_sampler(config) == name


def test_a_schedule_does_not_depend_on_the_variant_that_a_model_comes_with() -> None:
    karras = schedules_of({**SD, **DPM, "use_karras_sigmas": True}).get("dpmpp_2m", 8, 0.6, *SIZE)
    assert karras == schedules_of(SD).get("dpmpp_2m", 8, 0.6, *SIZE)


NOISE = StrengthMode.NOISE_LEVEL
SHARES = (0.02, 0.2, 0.35, 0.5, 0.61, 0.8, 0.9, 0.98)
EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}


def from_noise(family: Family, config: dict[str, Any], names: Sequence[str]) -> list[Schedule]:
    """Returns runs of 4 steps from each share, by the scheduler's name."""
    schedules = Schedules(family, config)
    return [schedules.get(name, 4, share, *SIZE, NOISE) for name in names for share in SHARES]


def check_first_steps(runs: Sequence[Schedule], kind: str) -> None:
    """Checks the first step of each run with the output of a perfect model."""
    image, noise = 0.3, -0.7
    for run, share in zip(runs, SHARES * (len(runs) // len(SHARES)), strict=True):
        assert run.noise_share == pytest.approx(share, abs=1e-6)
        first, latents = run.steps[0], run.init_signal * image + run.init_noise * noise
        signal = (1 - share**2) ** 0.5
        outputs = {
            "epsilon": noise,
            "v_prediction": signal * noise - share * image,
            "flow": noise - image,
        }
        found = first.clean[0] * latents + first.clean[-2] * outputs[kind]
        assert found == pytest.approx(image, abs=2e-4)
        after = first.slots[0][0] * latents + first.slots[0][-2] * outputs[kind]
        if len(run.steps) == 1:
            assert after == pytest.approx(image, abs=2e-4)


def test_strength_as_a_noise_level_is_the_share_of_noise_at_the_first_step() -> None:
    names = [name for name in DIFFUSION_SAMPLERS if name not in ("lcm", "tcd")]
    check_first_steps(from_noise(StableDiffusion(), SD, names), "epsilon")
    check_first_steps(from_noise(StableDiffusion(), ZERO_SNR_V, names), "v_prediction")
    for config in ({}, {"shift": 3.0}, {"use_dynamic_shifting": True}):
        check_first_steps(from_noise(FlowFamily(), config, ["flow_match_euler"]), "flow")
    for run, share in zip(from_noise(StableDiffusion(), EDM, ["edm_euler"]), SHARES, strict=True):
        assert run.noise_share == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("level", [(0.8, 0.6), (0.3, 0.7), (1.0, 14.0)])
def test_latents_and_output_give_the_clean_latents_and_the_noise(
    kind: str, level: tuple[float, float]
) -> None:
    image, noise, (signal, sigma) = 0.3, -0.7, level
    if kind == "flow_prediction":
        signal = 1 - sigma
    size = math.hypot(signal, sigma)
    output = {
        "epsilon": noise,
        "v_prediction": (signal * noise - sigma * image) / size,
        "sample": image,
        "flow_prediction": noise - image,
    }[kind]
    latents = signal * image + sigma * noise
    parts = _parts(kind, signal, sigma)
    found = [of_latents * latents + of_output * output for of_latents, of_output in parts]
    assert found == pytest.approx([image, noise])


def test_few_steps_have_more_noise_levels_than_steps() -> None:
    for name in DIFFUSION_SAMPLERS:
        runs = from_noise(StableDiffusion(), SD, [name])
        assert len({run.noise_share for run in runs}) == len(SHARES)
        assert [len(run.steps) for run in runs] == sorted(len(run.steps) for run in runs)


@pytest.mark.parametrize("name", DIFFUSION_SAMPLERS)
def test_a_noise_level_of_the_schedule_is_the_run_that_begins_there(name: str) -> None:
    schedules = schedules_of(SD)
    for steps, strength in ((4, 0.5), (9, 1.0)):
        plain = schedules.get(name, steps, strength, *SIZE)
        assert schedules.get(name, steps, plain.noise_share, *SIZE, NOISE) == plain


def test_families_with_schedules_of_their_own_take_a_noise_level() -> None:
    for run, share in zip(from_noise(SanaSprint(), {}, ["scm"]), SHARES, strict=True):
        assert run.noise_share == pytest.approx(share, abs=1e-6)
    for run, share in zip(from_noise(LatentConsistency(), SD, ["lcm"]), SHARES, strict=True):
        assert run.noise_share == pytest.approx(share, abs=0.08) or share < 0.1


@pytest.mark.parametrize(("share", "steps"), [(0.01, 1), (0.3, 4), (0.9, 29), (1.0, 50)])
def test_a_consistency_model_runs_only_the_steps_below_a_noise_level(
    share: float, steps: int
) -> None:
    run = Schedules(LatentConsistency(), SD).get("lcm", 50, share, *SIZE, NOISE)
    assert len(run.steps) == steps
    assert run.noise_share == pytest.approx(share, abs=0.05) or share < 0.1


def test_no_step_runs_from_no_noise() -> None:
    assert schedules_of(SD).get("ddim", 4, 0.0, *SIZE, NOISE).steps == ()
