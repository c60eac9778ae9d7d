"""Sampling as numbers: every sampler we offer is one linear update with its own coefficients.

For latents `x`, the model's output `out`, the clean picture `clean` that the sampler predicted in
its previous step, and fresh noise:

    x'     = sample * x + output * out + previous * clean + noise * randn
    clean' = clean_sample * x + clean_output * out

The coefficients of a row depend on its scheduler, step count and strength, and are known before it
begins. So rows with different samplers take a step together, and neighbours cannot change one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from img2img_server.engine.host_copy import to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step's numbers, see above.

    `timestep`: what the model is told; may have a fraction. `input_scale`: the model sees the
    latents times this. `draws_noise`: the row's generator is asked for noise, also where its
    coefficient is 0. `sigma_after`: ratio of noise to signal once the step is done.
    """

    timestep: float
    input_scale: float
    sample: float
    output: float
    previous: float
    noise: float
    clean_sample: float
    clean_output: float
    draws_noise: bool
    sigma_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A whole run. It begins with `init_signal * image latents + init_noise * randn`."""

    init_signal: float
    init_noise: float
    steps: tuple[Step, ...]


# Columns of a table of coefficients.
_TIMESTEP, _INPUT_SCALE, _SAMPLE, _OUTPUT, _PREVIOUS, _NOISE, _CLEAN_SAMPLE, _CLEAN_OUTPUT = range(
    8
)
_COLUMNS = (
    "timestep",
    "input_scale",
    "sample",
    "output",
    "previous",
    "noise",
    "clean_sample",
    "clean_output",
)


def coefficient_table(schedule: Schedule, device: torch.device) -> Tensor:
    """The coefficients of all steps: float32, steps x 8. Made once, so that steps copy nothing."""
    rows = [[getattr(step, name) for name in _COLUMNS] for step in schedule.steps]
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, len(_COLUMNS))
    return to_device(table, device)


def timesteps(coefficients: Tensor) -> Tensor:
    """What the model is told: one timestep a row."""
    return coefficients[:, _TIMESTEP]


def scale_input(latents: Tensor, coefficients: Tensor) -> Tensor:
    """What the model sees: latents n x c x h x w, one line of coefficients a row."""
    return latents * _column(coefficients, _INPUT_SCALE)


def advance(
    latents: Tensor,
    output: Tensor,
    clean: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """Takes one step of every row; returns the new latents and the predicted clean ones.

    All tensors float32, n x c x h x w; `noise` None where no row draws any.
    """
    result = latents * _column(coefficients, _SAMPLE)
    result += output * _column(coefficients, _OUTPUT)
    result += clean * _column(coefficients, _PREVIOUS)
    if noise is not None:
        result += noise * _column(coefficients, _NOISE)
    predicted = latents * _column(coefficients, _CLEAN_SAMPLE)
    predicted += output * _column(coefficients, _CLEAN_OUTPUT)
    return result, predicted


def draw_noise(generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal noise of a tensor's shape and device, float32.

    Drawn on the CPU, so that a seed means the same everywhere, and in the order of diffusers.
    """
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return to_device(noise, like.device)


def _column(coefficients: Tensor, index: int) -> Tensor:
    return coefficients[:, index].reshape(-1, 1, 1, 1)
