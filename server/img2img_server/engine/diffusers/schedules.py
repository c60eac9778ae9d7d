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

from img2img_server.default_dtype import DEFAULT_DTYPE
from img2img_server.domain.strength import StrengthMode
from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.diffusers.samplers import SAMPLERS
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.sampler import MAX_SLOTS, Schedule, Step, draw_noise

# Elements of the probe: the latents, the output, the tensors that the scheduler remembers, and one
# that is 0 in every input and shows the noise.
_SLOTS, _OUTPUT, _ELEMENTS = 12, 12, 14
FLOW = "flow_prediction"
_SAME_SHARE = 1e-6  # Shares of noise with a smaller difference count as equal.


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Returns the diffusers scheduler for one of our names, with the model's configuration."""
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
        self._shares = lru_cache(maxsize=4)(self._shares_uncached)

    def get(
        self,
        name: str,
        num_inference_steps: int,
        strength: float,
        height: int,
        width: int,
        mode: StrengthMode = StrengthMode.STEPS,
    ) -> Schedule:
        """Returns the schedule of one request, with as many steps as diffusers would run.

        Raises:
            ValueError: The family has no such scheduler, or it cannot run this number of steps.
        """
        if name not in self._family.offered(self._config):
            raise ValueError(f"there is no scheduler {name}")
        arguments = {
            **self._family.timestep_arguments(self._config, num_inference_steps, height, width),
            **self._family.strength_arguments(strength),
        }
        if mode is StrengthMode.NOISE_LEVEL and strength:
            run, share = 0, strength
        else:
            rule, share = self._family.strength_rule, 0.0
            run = rule.denoising_steps(strength, num_inference_steps)
        try:
            with DEFAULT_DTYPE.normal():  # The tables of the schedulers have the default format.
                return self._derive(name, num_inference_steps, run, share, tuple(arguments.items()))
        except (ValueError, IndexError) as error:  # diffusers raises errors of both types
            raise ValueError(
                f"scheduler {name} cannot run {num_inference_steps} steps of this model"
            ) from error

    def noise_shares(
        self, name: str, num_inference_steps: int, height: int, width: int
    ) -> tuple[float, ...]:
        """Returns the shares of noise at which the steps begin, the last step's first.

        Raises:
            ValueError: The scheduler cannot run this number of steps.
        """
        arguments = {
            **self._family.timestep_arguments(self._config, num_inference_steps, height, width),
            **self._family.strength_arguments(1.0),
        }
        try:
            with DEFAULT_DTYPE.normal():
                return self._shares(name, num_inference_steps, tuple(arguments.items()))
        except IndexError as error:
            raise ValueError(f"scheduler {name} cannot run {num_inference_steps} steps") from error

    def _shares_uncached(
        self, name: str, num_inference_steps: int, arguments: tuple[tuple[str, Any], ...]
    ) -> tuple[float, ...]:
        scheduler = self._make(name, num_inference_steps, dict(arguments))
        return tuple(self._family.noise_shares(scheduler, num_inference_steps))

    def _make(self, name: str, num_inference_steps: int, arguments: Mapping[str, Any]) -> Any:
        """Returns a scheduler whose timesteps are set."""
        config = self._config
        if num_inference_steps == 1 and config.get("shift_terminal"):
            # One step cannot be stretched to a terminal value: diffusers divides by 0.
            config = {**config, "shift_terminal": None}
        scheduler = make_scheduler(name, config)
        scheduler.set_timesteps(**{"num_inference_steps": num_inference_steps, **arguments})
        return scheduler

    def _derive_uncached(
        self,
        name: str,
        num_inference_steps: int,
        run: int,
        share: float,
        arguments: tuple[tuple[str, Any], ...],
    ) -> Schedule:
        def make(**changes: Any) -> Any:
            return self._make(name, num_inference_steps, {**dict(arguments), **changes})

        if share:
            return self._family.schedule_from_noise(make, share, num_inference_steps)
        return self._family.derive_schedule(make(), run, num_inference_steps)


def noise_shares(scheduler: Any, num_inference_steps: int) -> Iterator[float]:
    """Yields the shares of noise at which the steps of a scheduler begin, the last step's first."""
    for run in range(1, num_inference_steps + 1):
        signal, noise = _noise_level(scheduler, (num_inference_steps - run) * scheduler.order)
        yield _share(scheduler, signal, noise)


def _share(scheduler: Any, signal: float, noise: float) -> float:
    """Returns the share of noise at a level."""
    level = Schedule(init_signal=signal, init_noise=noise, steps=(), is_flow=_is_flow(scheduler))
    return level.noise_share


def schedules_of(family: Family, files: ModelFiles) -> Schedules:
    """Returns the schedules of a model that is not loaded."""
    return Schedules(family, family.scheduler_config(files.index, files.scheduler))


def derive_schedule(scheduler: Any, run: int, num_inference_steps: int) -> Schedule:
    """Returns the run of a scheduler whose timesteps are set.

    Args:
        run: How many of `num_inference_steps` run; the scheduler may take more than one step of
            the model for each.

    Raises:
        ValueError: The scheduler cannot run this number of steps, or remembers too many tensors.
        IndexError: The scheduler cannot run this number of steps.
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
    return Schedule(
        init_signal=levels[0][0],
        init_noise=levels[0][1],
        steps=_without_unused(steps),
        is_flow=_is_flow(scheduler),
    )


def schedule_from_noise(
    make: Callable[[], Any],
    share: float,
    num_inference_steps: int,
    derive: Callable[[Any, int, int], Schedule],
) -> Schedule:
    """Returns a schedule that begins with a share of noise: one step from this share to the next
    noise level of the scheduler, then the scheduler's own steps.

    Args:
        make: Returns a scheduler whose timesteps are set.
        share: The share of noise, above 0. It is limited to the largest share in the model's
            training.
        derive: Returns the schedule of a scheduler's last steps.
    """
    scheduler, run, found = make(), 0, 0.0
    for found in noise_shares(scheduler, num_inference_steps):
        run += 1
        if found >= share - _SAME_SHARE:
            break
    share = min(share, max(found, _largest_share(scheduler)))
    if abs(found - share) <= _SAME_SHARE:
        return derive(make(), run, num_inference_steps)
    return _begin_at(scheduler, share, derive(make(), run - 1, num_inference_steps))


def _begin_at(scheduler: Any, share: float, rest: Schedule) -> Schedule:
    """Returns a schedule with one more step at its beginning, of first order, from a share of
    noise.
    """
    signal, noise = math.sqrt(1 - share**2), share
    sigma = noise / signal
    first, _ = _noise_level(scheduler, 0)
    kind = _prediction_of(scheduler)
    counts_sigmas = abs(first - 1.0) < 1e-9 and kind != FLOW
    input_scale = 1.0
    # Clean latents and noise, expressed as weights of latents and output.
    if hasattr(scheduler, "precondition_outputs"):
        timestep = math.log(sigma) / 4
        data = scheduler.config.sigma_data
        size = math.hypot(sigma, data)
        input_scale = 1 / size
        sign = -1 if kind == "v_prediction" else 1
        clean = data**2 / size**2, sign * sigma * data / size
        drawn = (1 - clean[0]) / sigma, -clean[1] / sigma
    else:
        if kind == FLOW:
            signal, noise = 1 - share, share
            timestep = share * scheduler.config.num_train_timesteps
        else:
            timestep = _timestep_of(scheduler, sigma)
            input_scale = signal if counts_sigmas else 1.0
        clean, drawn = _parts(kind, signal, noise)
        clean, drawn = (clean[0] * input_scale, clean[1]), (drawn[0] * input_scale, drawn[1])
    if counts_sigmas:
        signal, noise = 1.0, sigma
    after = [rest.init_signal * x + rest.init_noise * y for x, y in zip(clean, drawn, strict=True)]
    step = Step(
        timestep=timestep,
        input_scale=input_scale,
        slots=((*after, 0.0),),
        clean=(*clean, 0.0),
        draws_noise=False,
        sigma_after=rest.init_noise / rest.init_signal,
    )
    return replace(
        rest,
        init_signal=signal,
        init_noise=noise,
        steps=(step, *rest.steps),
        is_flow=_is_flow(scheduler),
    )


def _largest_share(scheduler: Any) -> float:
    """Returns the largest share of noise that a model was trained with, just below 1 if it is 1; 0
    if the scheduler does not know it."""
    signals = getattr(scheduler, "alphas_cumprod", None)
    return 0.0 if signals is None else min(math.sqrt(1 - float(signals[-1])), 1 - 1e-6)


def _timestep_of(scheduler: Any, sigma: float) -> float:
    """Returns the timestep, with a fraction, at which the ratio of noise to signal has this
    value.
    """
    signals = scheduler.alphas_cumprod.double().clamp(min=1e-12).numpy()
    sigmas = np.sqrt((1 - signals) / signals)
    return float(np.interp(math.log(sigma), np.log(sigmas), np.arange(len(sigmas))))


def _is_flow(scheduler: Any) -> bool:
    return hasattr(scheduler, "scale_noise")


def _prediction_of(scheduler: Any) -> str:
    """Returns what the model predicts, in the words of the scheduler's configuration."""
    return FLOW if _is_flow(scheduler) else str(scheduler.config.prediction_type)


def _begin(scheduler: Any, index: int) -> None:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def _unit(element: int) -> Tensor:
    """Returns a tensor that is 1 in one element."""
    tensor = torch.zeros(1, 1, 1, _ELEMENTS)
    tensor[..., element] = 1.0
    return tensor


def _noise_level(scheduler: Any, index: int) -> tuple[float, float]:
    """Returns the factors of the image and of the noise at the start of a run at this step."""
    _begin(scheduler, index)
    image, noise, timestep = _unit(0), _unit(_OUTPUT), scheduler.timesteps[index : index + 1]
    if _is_flow(scheduler):
        mixed = scheduler.scale_noise(image, timestep, noise)
    else:
        mixed = scheduler.add_noise(image, noise, timestep)
    mixed = mixed.flatten()
    return float(mixed[0]), float(mixed[_OUTPUT])


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor that a scheduler remembers, with a function that replaces it."""

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
    """Returns the distinct tensors of the places."""
    return list({id(place.tensor): place.tensor for place in places}.values())


def _probe(
    scheduler: Any, timestep: Tensor, level: tuple[float, float], sigma_after: float
) -> Step:
    """Runs one step of the scheduler on unit inputs and reads its weights from the result."""
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
    # The stock pipelines pass an eta of 0, which overrides the scheduler's default.
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
    """Returns the weights in a result: of the slots, of the output and of the noise."""
    values, noise = tensor.flatten(), 0.0
    if drawn is not None:
        drawn = drawn.flatten()
        noise = float(values[-1] / drawn[-1])
        share = noise * drawn
        values = values - share
        # Rounding errors are removed where the exact weight is 0.
        values = torch.where(values.abs() <= 1e-6 * share.abs(), 0.0, values)
    return (*values[:width].tolist(), float(values[_OUTPUT]), noise)


def _predicted(scheduler: Any, level: tuple[float, float], width: int) -> tuple[float, ...]:
    """Returns the weights of the clean latents for schedulers that do not give them."""
    (sample, output), _ = _parts(_prediction_of(scheduler), *level)
    return (sample, *[0.0] * (width - 1), output, 0.0)


def _parts(
    kind: str, signal: float, noise: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the clean latents and the noise, each as weights of the latents and of the output.

    Args:
        kind: The prediction type of the model, in the words of the scheduler.
        signal: The factor of the clean latents in the latents.
        noise: The factor of the noise in the latents.
    """
    if kind == FLOW:
        return (1.0, -noise), (1.0, signal)
    if kind == "v_prediction":
        size = math.hypot(signal, noise)
        return (signal / size**2, -noise / size), (noise / size**2, signal / size)
    signal, noise = max(signal, 1e-6), max(noise, 1e-6)
    if kind == "sample":
        return (0.0, 1.0), (1 / noise, -signal / noise)
    return (1 / signal, -noise / signal), (0.0, 1.0)


def _without_unused(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Removes remembered tensors that no later step uses.

    Raises:
        ValueError: A step needs more than a row keeps.
    """
    found: list[Step] = []
    # the slots that later steps use after this one; after the last step, the latents
    used: Sequence[int] = (0,)
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
