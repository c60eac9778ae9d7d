"""The content of a LoRA file as changes of the layers of a model, by part."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import torch
from torch import Tensor, nn

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.diffusers.lora_forms import Change
from img2img_server.engine.diffusers.watched_folder import Seen
from img2img_server.errors import EngineError


class Part(StrEnum):
    """The parts of a model that a LoRA can change."""

    DENOISER = "denoiser"
    TEXT = "text"


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A change of one layer as two factors: up @ down * factor.

    Attributes:
        down: rank x inputs, with the kernel of a convolution.
        up: outputs x rank.
    """

    layer: nn.Module
    down: Tensor
    up: Tensor
    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class LoraContent:
    """The content of a file.

    Attributes:
        changes: The changes of weights by part.
        branches: The same changes as factors, by part; None for a part with a change that has no
            factors.
        branch_work: The work of the factors as a share of the work of their layers, by part;
            infinity if a change has no factors.
    """

    changes: Mapping[Part, tuple[Change, ...]]
    branches: Mapping[Part, tuple[LowRank, ...] | None]
    branch_work: Mapping[Part, float]

    @classmethod
    def of(cls, changes: Sequence[Change], family: Family) -> Self:
        """Sorts changes by part."""
        by_part = {
            Part.DENOISER: tuple(it for it in changes if it.part == family.denoiser),
            Part.TEXT: tuple(it for it in changes if it.part != family.denoiser),
        }
        unbatched = {Part.DENOISER: family.unbatched_layers, Part.TEXT: ""}
        branches = {part: _factors(own, unbatched[part]) for part, own in by_part.items()}
        work = {part: _branch_work(branches[part], own) for part, own in by_part.items()}
        return cls(by_part, branches, work)


def content_of(adapter: Adapter) -> LoraContent:
    """Returns the content of an adapter.

    Raises:
        EngineError: There was no file when the adapter was made.
    """
    if not isinstance(adapter.content, Seen) or adapter.content.content is None:
        raise EngineError(f"the LoRA {adapter.name} was removed")
    content: LoraContent = adapter.content.content
    return content


def _branch_work(branches: Sequence[LowRank] | None, changes: Sequence[Change]) -> float:
    if branches is None:
        return math.inf
    work = sum(low.down.numel() + low.up.numel() for low in branches)
    return work / max(1, sum(change.weight.numel() for change in changes))


def _factors(changes: Sequence[Change], unbatched: str) -> tuple[LowRank, ...] | None:
    """Returns the changes as factors, or None if one has none.

    Args:
        unbatched: A pattern of the layers whose input has not one row for each forward.
    """
    found = []
    for change in changes:
        low = _factors_of(change)
        if low is None or re.fullmatch(unbatched, change.layer):
            return None
        found.append(low)
    return tuple(found)


def _factors_of(change: Change) -> LowRank | None:
    own, layer = change.group.tensors, change.module
    is_convolution = (
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    )
    if (
        change.has_magnitude
        or "up" not in own
        or not (is_convolution or isinstance(layer, nn.Linear))
    ):
        return None
    down, up = own["down"], own["up"].flatten(1)
    if "mid" in own:
        down = torch.einsum("rskl,si->rikl", own["mid"].float(), down.float().flatten(1))
    if change.rows is not None:
        up = up[change.rows]
    if change.columns is not None:
        down = down[:, change.columns]
    return LowRank(layer, down.reshape(len(down), *change.weight.shape[1:]), up, change.factor)
