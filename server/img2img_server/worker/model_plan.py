"""Decides which model a worker loads next, and which models it unloads for it.

See docs/adr/0022-several-models-on-one-worker.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedModel:
    """A model that is not loaded and has unfinished jobs.

    Attributes:
        size: The bytes of its weights.
        since: Monotonic time since when the worker knows these jobs.
        is_served: Another worker has loaded the model, or loads it.
    """

    name: str
    size: int
    since: float
    is_served: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is loaded.

    Attributes:
        size: The bytes of its weights.
        used_at: Monotonic time when a job last needed it.
        loaded_at: Monotonic time when it was loaded.
        is_busy: It has unfinished jobs.
    """

    name: str
    size: int
    used_at: float
    loaded_at: float
    is_busy: bool


@dataclass(frozen=True, slots=True)
class Swap:
    """A model to load, and the models to unload before."""

    load: str
    unload: tuple[str, ...] = ()


# Returns whether there is room for a model of that size after models of the other size in total
# were unloaded.
HasRoom = Callable[[int, int], bool]


def choose_swap(
    wanted: Sequence[WantedModel],
    loaded: Sequence[LoadedModel],
    has_room: HasRoom,
    now: float,
    swap_seconds: float,
) -> Swap | None:
    """Returns the next model to load; None if the loaded ones stay for now.

    The model whose jobs wait longest goes first. Idle models are unloaded for it, the least
    recently used one first. Models with jobs are unloaded only after it has waited for
    `swap_seconds`, the one that was loaded first at first, and none before it was loaded for that
    time. A model that another worker serves gets no place of a model with jobs, and waits for
    `swap_seconds` in any case.
    """
    for model in sorted(wanted, key=lambda each: (each.is_served, each.since)):
        is_due = now - model.since >= swap_seconds
        if model.is_served and not is_due:
            continue
        victims = sorted((each for each in loaded if not each.is_busy), key=lambda it: it.used_at)
        if is_due and not model.is_served:
            busy = [it for it in loaded if it.is_busy and now - it.loaded_at >= swap_seconds]
            victims += sorted(busy, key=lambda it: it.loaded_at)
        for count in range(len(victims) + 1):
            chosen = victims[:count]
            # A model may always be loaded alone: whether it fits is known best by trying.
            if len(chosen) == len(loaded) or has_room(model.size, sum(it.size for it in chosen)):
                return Swap(model.name, tuple(it.name for it in _needed(chosen, model, has_room)))
    return None


def _needed(
    chosen: Sequence[LoadedModel], model: WantedModel, has_room: HasRoom
) -> list[LoadedModel]:
    """Returns the models without those that need not be unloaded after all."""
    kept = list(chosen)
    for each in chosen:
        rest = [other for other in kept if other is not each]
        if has_room(model.size, sum(other.size for other in rest)):
            kept = rest
    return kept
