"""Turns a scheduler of diffusers into the plain numbers of sampler.py.

Nothing is re-derived: each step of the real scheduler is asked for its answer to unit inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.sampler import Schedule, Step, draw_noise

# Clipping and thresholding are meant for pixels and are not linear; latents have no such range.
_NOT_CLIPPED = {"clip_sample": False, "thresholding": False}
_CLASSES: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, _NOT_CLIPPED),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "lcm": (LCMScheduler, _NOT_CLIPPED),
    "dpmpp_2m": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False},
    ),
}

# The probe's elements: 1 in the sample, in the output, in the previous clean picture, in nothing.
_SAMPLE = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
_OUTPUT = torch.tensor([0.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
_PREVIOUS = torch.tensor([0.0, 0.0, 1.0, 0.0]).reshape(1, 1, 1, 4)


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler behind one of our names, with the model's own configuration."""
    scheduler_class, overrides = _CLASSES[name]
    return scheduler_class.from_config(config, **overrides)  # type: ignore[attr-defined]


class Schedules:
    """Schedules of one model, derived when first asked for.

    Args:
        config: the model's scheduler configuration.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._derive = lru_cache(maxsize=256)(self._derive_uncached)

    def get(self, name: str, num_inference_steps: int, strength: float) -> Schedule:
        """The schedule of one request, with as many steps as diffusers would run.

        Raises:
            ValueError: there is no such scheduler, or it cannot run so many steps.
        """
        if name not in _CLASSES:
            raise ValueError(f"there is no scheduler {name}")
        run = StrengthRule.FLOOR.denoising_steps(strength, num_inference_steps)
        try:
            return self._derive(name, num_inference_steps, num_inference_steps - run)
        except (ValueError, IndexError) as error:  # diffusers raises either
            raise ValueError(
                f"scheduler {name} cannot run {num_inference_steps} steps of this model"
            ) from error

    def _derive_uncached(self, name: str, num_inference_steps: int, start: int) -> Schedule:
        scheduler = make_scheduler(name, self._config)
        scheduler.set_timesteps(num_inference_steps)
        if start == num_inference_steps:
            return Schedule(init_signal=1.0, init_noise=0.0, steps=())
        levels = [
            _noise_level(scheduler, index) for index in range(start, len(scheduler.timesteps))
        ]
        ratios = [noise / signal if signal else float("inf") for signal, noise in levels]
        _begin(scheduler, start)
        steps = tuple(
            _probe(scheduler, timestep, sigma_after)
            for timestep, sigma_after in zip(
                scheduler.timesteps[start:], (*ratios[1:], 0.0), strict=True
            )
        )
        return Schedule(init_signal=levels[0][0], init_noise=levels[0][1], steps=steps)


def _begin(scheduler: Any, index: int) -> None:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def _noise_level(scheduler: Any, index: int) -> tuple[float, float]:
    """Factors of the image and of the noise when a run begins at this step."""
    _begin(scheduler, index)
    timestep = scheduler.timesteps[index : index + 1]
    mixed = scheduler.add_noise(_SAMPLE, _OUTPUT, timestep).flatten()
    return float(mixed[0]), float(mixed[1])


def _probe(scheduler: Any, timestep: Tensor, sigma_after: float) -> Step:
    """Runs one step of the scheduler on unit inputs and reads its coefficients off."""
    input_scale = scheduler.scale_model_input(_SAMPLE, timestep).flatten()[0]
    memory = getattr(scheduler, "model_outputs", None)
    if memory is not None and memory[-1] is not None:
        memory[-1] = _PREVIOUS
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    answer = scheduler.step(_OUTPUT, timestep, _SAMPLE, generator=generator, return_dict=False)
    draws_noise = not torch.equal(before, generator.get_state())
    result = answer[0].flatten()
    clean = (memory[-1] if memory is not None else answer[1]).flatten()
    noise = 0.0
    if draws_noise:
        drawn = draw_noise(torch.Generator().manual_seed(0), _SAMPLE).flatten()
        noise = float(result[3] / drawn[3])
        result = result - noise * drawn
    return Step(
        timestep=float(timestep),
        input_scale=float(input_scale),
        sample=float(result[0]),
        output=float(result[1]),
        previous=float(result[2]),
        noise=noise,
        clean_sample=float(clean[0]),
        clean_output=float(clean[1]),
        draws_noise=draws_noise,
        sigma_after=sigma_after,
    )
