"""The models and requests of the oracle tests. A module in tests/oracle/families has `MODELS`: a
name and an OracleModel for each tiny model of its family. A family needs nothing else to be
compared with diffusers.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from img2img_server.engine.base import EngineJob
from tests.engine_bench import blocks, job, stock_call

# `make oracle` sets this variable, which selects every combination instead of a set that covers
# each pair of values.
IS_FULL = os.environ.get("ORACLE") == "full"

# Pairs of strength and num_inference_steps. For the first four, rounding differs by family, or the
# float expression differs from an exact ceiling.
RUNS = (
    (0.28, 25),
    (0.14, 50),
    (0.6, 8),
    (0.6, 28),
    (0.05, 21),
    (0.1, 13),
    (0.3, 7),
    (0.5, 9),
    (0.85, 5),
    (1.0, 1),
    (1.0, 11),
)
# Their pipelines pack the latents before the scheduler draws its noise, so the same numbers are at
# other places of the image.
_PACKED = ("flux", "qwen_image", "chroma", "krea2")
PROMPTS = ("a boat", "a sea wall")
NEGATIVE_PROMPTS = ("", "fog")
SEEDS = ((5,), (11, 12, 13, 14))


@dataclass(frozen=True, slots=True)
class OracleModel:
    """A tiny random model, and the requests for its family.

    Attributes:
        write: Writes the model into a folder and returns it.
        guidance_scales: Off first, by the family's own rule; all equal if there is no guidance.
        sizes: Heights and widths: none square, none a multiple of 64 in both.
        call: Returns the stock pipeline's arguments for a request.
        schedulers: Those to compare; empty for all that the family offers.
        runs: Strengths and steps to compare.
        most_steps: The largest number of steps at strength 1, if steps / strength is limited.
        options: Further parameters of each request.
    """

    write: Callable[[Path], Path]
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 7.5)
    sizes: tuple[tuple[int, int], ...] = ((64, 72), (72, 104), (120, 88))
    call: Callable[[EngineJob], dict[str, Any]] = stock_call
    schedulers: tuple[str, ...] = ()
    runs: tuple[tuple[float, int], ...] = RUNS
    most_steps: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)


@cache
def families() -> Mapping[str, Mapping[str, OracleModel]]:
    """Returns the models by family, from the modules of tests/oracle/families."""
    folder = Path(__file__).parent / "families"
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return {name: importlib.import_module(f"tests.oracle.families.{name}").MODELS for name in names}


def models() -> Mapping[str, OracleModel]:
    """Returns the models of all families."""
    return {name: model for found in families().values() for name, model in found.items()}


@dataclass(frozen=True, slots=True)
class Case:
    """One request to one model."""

    model: str
    scheduler: str
    run: tuple[float, int]
    guidance_scale: float
    size: tuple[int, int]
    negative_prompt: str
    seeds: tuple[int, ...]
    prompt: str

    def job(self, **changes: Any) -> EngineJob:
        """Returns the request."""
        strength, steps = self.run
        return job(
            **{
                "scheduler": self.scheduler,
                "strength": strength,
                "num_inference_steps": steps,
                "guidance_scale": self.guidance_scale,
                "init_image": blocks(*self.size),
                "negative_prompt": self.negative_prompt,
                "seeds": self.seeds,
                "prompt": self.prompt,
                **models()[self.model].options,
                **changes,
            }
        )


def cases(family: str, schedulers: Sequence[str]) -> list[Case]:
    """Returns the requests to the models of a family.

    Args:
        schedulers: those that the family offers, for models that name none.
    """
    if family in _PACKED:
        schedulers = [name for name in schedulers if name != "flow_match_euler_stochastic"]
    groups: dict[Any, dict[str, OracleModel]] = {}
    for name, model in families()[family].items():
        groups.setdefault((model.schedulers or tuple(schedulers), model.runs), {})[name] = model
    return [
        case for (offered, runs), group in groups.items() for case in _cases(group, offered, runs)
    ]


def _cases(
    found: Mapping[str, OracleModel],
    schedulers: Sequence[str],
    runs: Sequence[tuple[float, int]],
) -> list[Case]:
    # The position selects sizes and scales, since these differ between the models.
    first = next(iter(found.values()))
    dimensions: list[Sequence[Any]] = [
        list(found),
        schedulers,
        runs,
        range(len(first.guidance_scales)),
        range(len(first.sizes)),
        NEGATIVE_PROMPTS,
        SEEDS,
        PROMPTS,
    ]
    if IS_FULL:
        few = itertools.cycle(itertools.product(SEEDS, PROMPTS))
        rows = [(*row, *next(few)) for row in itertools.product(*dimensions[:-2])]
    else:
        rows = list(covering(dimensions))
    return [
        Case(
            name,
            scheduler,
            run,
            found[name].guidance_scales[guidance],
            found[name].sizes[size],
            *others,
        )
        for name, scheduler, run, guidance, size, *others in rows
    ]


def covering(dimensions: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Yields a small number of rows in which each pair of values of two dimensions occurs."""
    counts = [range(len(values)) for values in dimensions]
    pairs = itertools.combinations(range(len(counts)), 2)
    missing = {(i, a, j, b) for i, j in pairs for a in counts[i] for b in counts[j]}
    while missing:
        i, a, j, b = min(missing)
        row = {i: a, j: b}
        for k in sorted(set(range(len(counts))) - {i, j}, key=lambda k: -len(counts[k])):
            gains = [len(_pairs({**row, k: value}) & missing) for value in counts[k]]
            row[k] = gains.index(max(gains))
        missing -= _pairs(row)
        yield tuple(values[row[k]] for k, values in enumerate(dimensions))


def _pairs(row: Mapping[int, int]) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(sorted(row), 2)}
