"""Turns a scheduler of diffusers into the plain numbers of sampler.py.

No formula is derived: each step of the real scheduler is run on unit inputs, one element for the
latents, one for the output, one for each tensor that the scheduler remembers. The results are
the weights of the step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.diffusers.samplers import SAMPLERS
from img2img_server.engine.sampler import MAX_SLOTS, Schedule, Step, draw_noise

# Elements of the probe: the latents, the output, what the scheduler remembers, and one that is 0 in
# every input and shows the noise.
_SLOTS, _OUTPUT, _ELEMENTS = 12, 12, 14


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Returns the diffusers scheduler behind one of our names, configured as the model says."""
    sampler = SAMPLERS[name]
    scheduler_class = getattr(diffusers, sampler.class_name)
    changes = {**sampler.overrides, **sampler.variant}
    return scheduler_class.from_config({**sampler.defaults, **config}, **changes)


class Schedules:
    """Schedules of one model, each derived when it is first asked for.

    Args:
        config: The model's scheduler configuration.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self._family = family
        self._config = dict(config)
        self._derive = lru_cache(maxsize=256)(self._derive_uncached)

    def get(
        self, name: str, num_inference_steps: int, strength: float, height: int, width: int
    ) -> Schedule:
        """Returns the schedule of one request, with as many steps as diffusers would run.

        Raises:
            ValueError: The family has no such scheduler, or it cannot run so many steps.
        """
        if name not in self._family.offered(self._config):
            raise ValueError(f"there is no scheduler {name}")
        run = self._family.strength_rule.denoising_steps(strength, num_inference_steps)
        arguments = {
            **self._family.timestep_arguments(self._config, num_inference_steps, height, width),
            **self._family.strength_arguments(strength),
        }
        try:
            return self._derive(name, num_inference_steps, run, tuple(arguments.items()))
        except (ValueError, IndexError) as error:  # diffusers raises either
            raise ValueError(
                f"scheduler {name} cannot run {num_inference_steps} steps of this model"
            ) from error

    def _derive_uncached(
        self, name: str, num_inference_steps: int, run: int, arguments: tuple[tuple[str, Any], ...]
    ) -> Schedule:
        scheduler = make_scheduler(name, self._config)
        with np.errstate(invalid="ignore"):  # one step stretched to a terminal divides by 0
            scheduler.set_timesteps(num_inference_steps, **dict(arguments))
        return self._family.derive_schedule(scheduler, run, num_inference_steps)


def derive_schedule(scheduler: Any, run: int, num_inference_steps: int) -> Schedule:
    """Returns the run of a scheduler whose timesteps are set.

    Args:
        run: How many of `num_inference_steps` run; the scheduler may take more than one step of
            the model for each.

    Raises:
        ValueError: The scheduler cannot run so many steps, or remembers too much.
        IndexError: The same; diffusers raises either.
    """
    if not run:
        return Schedule(init_signal=1.0, init_noise=0.0, steps=())
    start = (num_inference_steps - run) * scheduler.order
    timesteps = scheduler.timesteps
    levels = [_noise_level(scheduler, index) for index in range(start, len(timesteps))]
    if not all(map(math.isfinite, levels[0])):
        raise ValueError("the scheduler's noise levels are not finite")
    ratios = [noise / signal if signal else float("inf") for signal, noise in levels]
    _begin(scheduler, start)
    steps = [
        _probe(scheduler, timestep, level, sigma_after)
        for timestep, level, sigma_after in zip(
            timesteps[start:], levels, (*ratios[1:], 0.0), strict=True
        )
    ]
    return Schedule(init_signal=levels[0][0], init_noise=levels[0][1], steps=_without_unused(steps))


def _begin(scheduler: Any, index: int) -> None:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def _unit(element: int) -> Tensor:
    """Returns a tensor that is 1 in one element."""
    tensor = torch.zeros(1, 1, 1, _ELEMENTS)
    tensor[..., element] = 1.0
    return tensor


def _noise_level(scheduler: Any, index: int) -> tuple[float, float]:
    """Returns the factors of the image and of the noise when a run begins at this step."""
    _begin(scheduler, index)
    image, noise, timestep = _unit(0), _unit(_OUTPUT), scheduler.timesteps[index : index + 1]
    if hasattr(scheduler, "scale_noise"):  # flow matching
        mixed = scheduler.scale_noise(image, timestep, noise)
    else:
        mixed = scheduler.add_noise(image, noise, timestep)
    mixed = mixed.flatten()
    return float(mixed[0]), float(mixed[_OUTPUT])


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor that a scheduler remembers, and the function that puts another one there."""

    tensor: Tensor
    put: Callable[[Tensor], object]


def _remembered(scheduler: Any) -> Iterator[_Place]:
    """Yields the tensors of the probe's shape that the scheduler keeps, also in lists."""
    for name, value in vars(scheduler).items():
        if _is_probe(value):
            yield _Place(value, partial(setattr, scheduler, name))
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if _is_probe(entry):
                    yield _Place(entry, partial(value.__setitem__, index))


def _is_probe(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == (1, 1, 1, _ELEMENTS)


def _distinct(places: Sequence[_Place]) -> list[Tensor]:
    """Returns the tensors behind the places, each once."""
    return list({id(place.tensor): place.tensor for place in places}.values())


def _probe(
    scheduler: Any, timestep: Tensor, level: tuple[float, float], sigma_after: float
) -> Step:
    """Runs one step of the scheduler on unit inputs and reads its weights off."""
    places = list(_remembered(scheduler))
    known = _distinct(places)
    if len(known) >= _SLOTS:
        raise ValueError("the scheduler remembers too many steps")
    units = {id(tensor): _unit(1 + index) for index, tensor in enumerate(known)}
    for place in places:
        place.put(units[id(place.tensor)])
    sample, output = _unit(0), _unit(_OUTPUT)
    input_scale = scheduler.scale_model_input(sample, timestep) if _scales(scheduler) else sample
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    # Eta is 0 in the stock pipelines, whatever the scheduler assumes without them.
    arguments = {"generator": generator, "eta": 0.0}
    taken = inspect.signature(scheduler.step).parameters.keys() & arguments.keys()
    answer = scheduler.step(output, timestep, sample, **{name: arguments[name] for name in taken})
    draws_noise = not torch.equal(before, generator.get_state())
    drawn = draw_noise(torch.Generator().manual_seed(0), sample) if draws_noise else None
    width = 1 + len(known)
    after = _distinct(list(_remembered(scheduler)))
    clean = getattr(answer, "pred_original_sample", None)
    if clean is None:
        clean = getattr(answer, "denoised", None)
    return Step(
        timestep=float(timestep),
        input_scale=float(input_scale.flatten()[0]),
        slots=tuple(_weights(tensor, width, drawn) for tensor in (answer.prev_sample, *after)),
        clean=(
            _predicted(scheduler, level, width) if clean is None else _weights(clean, width, drawn)
        ),
        draws_noise=draws_noise,
        sigma_after=sigma_after,
    )


def _scales(scheduler: Any) -> bool:
    return hasattr(scheduler, "scale_model_input")


def _weights(tensor: Tensor, width: int, drawn: Tensor | None) -> tuple[float, ...]:
    """Returns the weights that a result shows: of the slots, of the output, of the noise."""
    values, noise = tensor.flatten(), 0.0
    if drawn is not None:
        drawn = drawn.flatten()
        noise = float(values[-1] / drawn[-1])
        share = noise * drawn
        values = values - share
        # Rounding errors where the weight is 0.
        values = torch.where(values.abs() <= 1e-6 * share.abs(), 0.0, values)
    return (*values[:width].tolist(), float(values[_OUTPUT]), noise)


def _predicted(scheduler: Any, level: tuple[float, float], width: int) -> tuple[float, ...]:
    """Returns the weights of the clean latents for schedulers that do not give them."""
    signal, noise = level
    if hasattr(scheduler, "scale_noise"):
        sample, output = 1.0, -noise
    else:
        size = (signal**2 + noise**2) ** 0.5
        kind = scheduler.config.prediction_type
        if kind == "v_prediction":
            sample, output = signal / size**2, -noise / size
        elif kind == "sample":
            sample, output = 0.0, 1.0
        elif kind == "flow_prediction":
            sample, output = 1.0, -noise
        else:
            sample, output = 1 / max(signal, 1e-6), -noise / max(signal, 1e-6)
    return (sample, *[0.0] * (width - 1), output, 0.0)


def _without_unused(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Leaves out what the scheduler remembers and no later step uses.

    Raises:
        ValueError: A step needs more than a row keeps.
    """
    found: list[Step] = []
    used: Sequence[int] = (0,)  # slots after the step that count; of the last one the latents
    for step in reversed(steps):
        lines = [step.slots[slot] for slot in used]
        count = len(step.clean) - 2
        needed = [0, *(j for j in range(1, count) if any(line[j] for line in (*lines, step.clean)))]
        if len(needed) > MAX_SLOTS:
            raise ValueError("the scheduler remembers too many steps")
        columns = [*needed, count, count + 1]
        found.append(
            replace(
                step,
                slots=tuple(tuple(line[j] for j in columns) for line in lines),
                clean=tuple(step.clean[j] for j in columns),
            )
        )
        used = needed
    return tuple(reversed(found))
