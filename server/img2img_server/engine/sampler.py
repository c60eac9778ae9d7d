"""Samplers as numbers: every sampler is a linear recurrence with its own weights.

A row keeps a few tensors of one size, its slots. Slot 0 holds the latents; the others hold tensors
that the sampler remembers from earlier steps, for example earlier predictions. With the model's
output and fresh noise, one step is:

    slot'[i] = sum over j of weight[i, j] * slot[j] + weight[i, O] * output + weight[i, N] * noise
    clean    = the same sum with weights of its own: the clean latents that this step predicts

The weights of a row depend on its scheduler, step count, strength and size, and are known before
the row begins. So rows with different samplers can share a step, and no row changes the result of
another one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_SLOTS = 8  # most slots of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The numbers of one step, see above.

    Attributes:
        timestep: The timestep for the model; may have a fraction.
        input_scale: The factor of the latents in the model's input.
        slots: The weights of each slot after the step: of the slots before it, of the output, of
            the noise.
        clean: The weights of the predicted clean latents, in the same order.
        draws_noise: Whether the row's generator draws noise, even if its weight is 0.
        sigma_after: The ratio of noise to signal after the step.
    """

    timestep: float
    input_scale: float
    slots: tuple[tuple[float, ...], ...]
    clean: tuple[float, ...]
    draws_noise: bool
    sigma_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The schedule of a whole run, which begins with `init_signal * image latents + init_noise *
    randn`.
    """

    init_signal: float
    init_noise: float
    steps: tuple[Step, ...]
    is_flow: bool = False

    @property
    def noise_share(self) -> float:
        """Share of noise that the run begins with, 0 to 1: the noise's share of the standard
        deviation or, with flow matching, of the sum.
        """
        signal, noise = self.init_signal, self.init_noise
        return noise / (signal + noise if self.is_flow else math.hypot(signal, noise))


# Columns of a table of coefficients. The weights follow: MAX_SLOTS + 1 lines, the last one of the
# clean latents, each with MAX_SLOTS + 2 weights, the last two of the output and of the noise.
_TIMESTEP, _INPUT_SCALE, _WEIGHTS = 0, 1, 2
_CLEAN, _OUTPUT, _NOISE, _WIDTH = MAX_SLOTS, MAX_SLOTS, MAX_SLOTS + 1, MAX_SLOTS + 2


def coefficient_table(schedule: Schedule) -> Tensor:
    """Returns the coefficients of all steps on the CPU, float32, one line for each step."""
    lines = [_line(step) for step in schedule.steps]
    width = _WEIGHTS + (MAX_SLOTS + 1) * _WIDTH
    return torch.tensor(lines, dtype=torch.float32).reshape(-1, width)


def timesteps(coefficients: Tensor) -> Tensor:
    """Returns the timesteps for the model, one for each row."""
    return coefficients[:, _TIMESTEP]


def scale_input(latents: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
    """Returns the input of the model for each row.

    Args:
        latents: 1 x c x h x w of each row.
        coefficients: One line a row.
    """
    scales = torch.split(_column(coefficients, _INPUT_SCALE), 1)
    return [row * scale for row, scale in zip(latents, scales, strict=True)]


def advance(
    steps: Sequence[Step],
    slots: Sequence[Sequence[Tensor]],
    outputs: Sequence[Tensor],
    noise: Sequence[Tensor | None],
    coefficients: Tensor,
) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Takes one step of every row; rows whose steps use the same weights are computed together.

    Args:
        steps: The step that each row takes.
        slots: The slots of each row, 1 x c x h x w, float32.
        outputs: The model's output for each row, of the same shape.
        noise: The noise that each row drew, or None.
        coefficients: One line a row.

    Returns:
        The new slots and the predicted clean latents of each row.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, step in enumerate(steps):
        key = (_used_columns(step), slots[index][0].shape)
        groups.setdefault(key, []).append(index)
    results: dict[int, tuple[tuple[Tensor, ...], Tensor]] = {}
    for members in groups.values():
        terms = dict(enumerate(map(torch.cat, zip(*(slots[row] for row in members), strict=True))))
        terms[_OUTPUT] = torch.cat([outputs[row] for row in members])
        drawn = [tensor for row in members if (tensor := noise[row]) is not None]
        if drawn:
            terms[_NOISE] = torch.cat(drawn)
        # A whole line for each row is read on the device: an index from the host would wait for the
        # device.
        own = torch.stack([coefficients[row] for row in members])
        *kept, clean = (
            _combine(terms, own, line, columns)
            for line, columns in _used_columns(steps[members[0]])
        )
        for place, row in enumerate(members):
            part = slice(place, place + 1)
            results[row] = tuple(tensor[part] for tensor in kept), clean[part]
    return [results[row] for row in range(len(steps))]


def draw_noise(generator: torch.Generator, like: Tensor) -> Tensor:
    """Returns standard normal noise of a tensor's shape, float32, on the CPU.

    So a seed gives the same noise on every device, drawn in the order of diffusers.
    """
    return torch.randn(like.shape, generator=generator, dtype=torch.float32)


def _combine(
    terms: Mapping[int, Tensor], coefficients: Tensor, line: int, columns: Sequence[int]
) -> Tensor:
    """Returns the weighted sum of some terms, with the weights of one line."""
    start = _WEIGHTS + line * _WIDTH
    first, *others = columns
    result = terms[first] * _column(coefficients, start + first)
    for column in others:
        result += terms[column] * _column(coefficients, start + column)
    return result


@lru_cache(maxsize=4096)
def _used_columns(step: Step) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Returns each line of the weights with its columns that are not 0.

    In the order of summation: the latents, the output, the other slots, the noise.
    """
    lines = (*enumerate(step.slots), (_CLEAN, step.clean))
    count = len(step.clean) - 2
    places = (0, _OUTPUT, *range(1, count), _NOISE)
    found = []
    for line, weights in lines:
        by_place = dict(zip((*range(count), _OUTPUT, _NOISE), weights, strict=True))
        found.append((line, tuple(place for place in places if not place or by_place[place])))
    return tuple(found)


def _line(step: Step) -> list[float]:
    lines = [*step.slots, *[()] * (MAX_SLOTS - len(step.slots)), step.clean]
    numbers = [step.timestep, step.input_scale]
    for weights in lines:
        used = max(0, len(weights) - 2)
        numbers += [*weights[:used], *[0.0] * (MAX_SLOTS - used), *(weights[used:] or (0.0, 0.0))]
    return numbers


def _column(coefficients: Tensor, index: int) -> Tensor:
    return coefficients[:, index].reshape(-1, 1, 1, 1)
