"""Sampling as numbers: every sampler we offer is a linear recurrence with its own weights.

A row keeps a few tensors of one size, its slots. Slot 0 holds the latents; the others hold what the
sampler remembers of earlier steps, for example earlier predictions. With the model's output and
fresh noise, one step is:

    slot'[i] = sum over j of weight[i, j] * slot[j] + weight[i, O] * output + weight[i, N] * noise
    clean    = the same sum with weights of its own: the clean latents that this step predicts

The weights of a row depend on its scheduler, step count, strength and size, and are known before
the row begins. So rows with different samplers take a step together, and neighbours cannot change
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from img2img_server.engine.host_copy import to_device

MAX_SLOTS = 8  # of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The numbers of one step, see above.

    Attributes:
        timestep: What the model is given; may have a fraction.
        input_scale: The model sees the latents times this.
        slots: The weights of each slot after the step: of the slots before it, of the output, of
            the noise.
        clean: The weights of the predicted clean latents, in the same order.
        draws_noise: Whether the row's generator is asked for noise, even if its weight is 0.
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
    """A whole run. It begins with `init_signal * image latents + init_noise * randn`."""

    init_signal: float
    init_noise: float
    steps: tuple[Step, ...]


# Columns of a table of coefficients. The weights follow: MAX_SLOTS + 1 lines, the last one of the
# clean latents, each with MAX_SLOTS + 2 weights, the last two of the output and of the noise.
_TIMESTEP, _INPUT_SCALE, _WEIGHTS = 0, 1, 2
_CLEAN, _OUTPUT, _NOISE, _WIDTH = MAX_SLOTS, MAX_SLOTS, MAX_SLOTS + 1, MAX_SLOTS + 2


def coefficient_table(schedule: Schedule, device: torch.device) -> Tensor:
    """Returns the coefficients of all steps, float32, a line each.

    Made once for each run, so that its steps copy nothing to the device.
    """
    lines = [_line(step) for step in schedule.steps]
    width = _WEIGHTS + (MAX_SLOTS + 1) * _WIDTH
    return to_device(torch.tensor(lines, dtype=torch.float32).reshape(-1, width), device)


def timesteps(coefficients: Tensor) -> Tensor:
    """Returns what the model is given: one timestep a row."""
    return coefficients[:, _TIMESTEP]


def scale_input(latents: Tensor, coefficients: Tensor) -> Tensor:
    """Returns what the model sees.

    Args:
        latents: n x c x h x w.
        coefficients: One line a row.
    """
    return latents * _column(coefficients, _INPUT_SCALE)


def advance(
    steps: Sequence[Step],
    slots: Sequence[Sequence[Tensor]],
    output: Tensor,
    noise: Sequence[Tensor | None],
    coefficients: Tensor,
) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Takes one step of rows of one size.

    Args:
        steps: The step that each row takes.
        slots: The slots of each row, 1 x c x h x w, float32.
        output: The model's output, n x c x h x w, float32.
        noise: What each row drew, or None.
        coefficients: One line a row.

    Returns:
        The new slots of each row and the predicted clean latents of all rows.
    """
    count = max(map(len, slots))
    terms = {index: _stack([row[index : index + 1] for row in slots]) for index in range(count)}
    terms[_OUTPUT] = output
    if any(drawn is not None for drawn in noise):
        terms[_NOISE] = _stack([() if drawn is None else (drawn,) for drawn in noise])
    weights = [_by_column(step) for step in steps]
    results = [
        _combine(terms, coefficients, line, [found.get(line, ()) for found in weights])
        for line in (*range(max(len(step.slots) for step in steps)), _CLEAN)
    ]
    rows = [
        tuple(results[slot][index : index + 1] for slot in range(len(step.slots)))
        for index, step in enumerate(steps)
    ]
    return rows, results[-1]


def draw_noise(generator: torch.Generator, like: Tensor) -> Tensor:
    """Returns standard normal noise of a tensor's shape and device, float32.

    Drawn on the CPU, so that a seed means the same everywhere, and in the order of diffusers.
    """
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return to_device(noise, like.device)


def _combine(
    terms: dict[int, Tensor], coefficients: Tensor, line: int, used: Sequence[Sequence[int]]
) -> Tensor:
    """Returns the weighted sum of the terms that any row uses in this line of its weights."""
    columns = sorted({column for row in used for column in row} & terms.keys(), key=_place)
    start = _WEIGHTS + line * _WIDTH
    result = terms[columns[0]] * _column(coefficients, start + columns[0])
    for column in columns[1:]:
        result += terms[column] * _column(coefficients, start + column)
    return result


def _place(column: int) -> float:
    """Sorts the latents first, then the output, then the other slots and the noise."""
    return 0.5 if column == _OUTPUT else column


def _by_column(step: Step) -> dict[int, tuple[int, ...]]:
    """Returns the columns with a weight other than 0, by line; the latents count always."""
    lines = {**dict(enumerate(step.slots)), _CLEAN: step.clean}
    return {line: (0, *_columns(weights)) for line, weights in lines.items()}


def _columns(weights: Sequence[float]) -> list[int]:
    """Returns the columns of the weights other than 0."""
    used = len(weights) - 2
    places = (*range(used), _OUTPUT, _NOISE)
    return [column for column, weight in zip(places, weights, strict=True) if weight]


def _line(step: Step) -> list[float]:
    lines = [*step.slots, *[()] * (MAX_SLOTS - len(step.slots)), step.clean]
    numbers = [step.timestep, step.input_scale]
    for weights in lines:
        used = max(0, len(weights) - 2)
        numbers += [*weights[:used], *[0.0] * (MAX_SLOTS - used), *(weights[used:] or (0.0, 0.0))]
    return numbers


def _stack(found: Sequence[Sequence[Tensor]]) -> Tensor:
    """Stacks a tensor of each row; zeros for rows that have none."""
    like = next(row[0] for row in found if row)
    return torch.cat([row[0] if row else torch.zeros_like(like) for row in found])


def _column(coefficients: Tensor, index: int) -> Tensor:
    return coefficients[:, index].reshape(-1, 1, 1, 1)
