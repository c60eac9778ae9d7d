"""Adds the changes of LoRAs to the outputs of layers, so that rows of a batch can have different
ones and the weights of the model stay as they are.

A layer returns W x + scale * up (down x). The rows of one group are adjacent, so their inputs and
outputs are slices without a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils.hooks import RemovableHandle

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.lora_layers import LowRank, Part, content_of

# Factors of LoRAs that are not in use stay on the device up to this size.
_PLACED_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class Group:
    """Adjacent rows with the same adapters. `count`: 0 stands for all rows of any batch."""

    first: int
    count: int
    adapters: tuple[Adapter, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """The factors that one adapter adds to the output of one layer for the rows of one group."""

    group: Group
    rows: int  # of the whole batch
    down: Tensor
    up: Tensor
    scale: float

    def add(self, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        if self.group.count:
            if len(inputs) != self.rows:
                raise RuntimeError(f"a layer has {len(inputs)} rows in a batch of {self.rows}")
            inputs = inputs.narrow(0, self.group.first, self.group.count)
            outputs = outputs.narrow(0, self.group.first, self.group.count)
        down, up = self.down.to(inputs.device), self.up.to(inputs.device)
        if isinstance(layer, nn.Conv2d):
            hidden = conv2d(inputs, down, None, layer.stride, layer.padding, layer.dilation)
            outputs.add_(conv2d(hidden, up[:, :, None, None]), alpha=self.scale)
        elif outputs.is_contiguous():
            hidden = linear(inputs, down)
            flat = outputs.view(-1, outputs.shape[-1])
            flat.addmm_(hidden.reshape(-1, hidden.shape[-1]), up.T, alpha=self.scale)
        else:
            outputs.add_(linear(linear(inputs, down), up), alpha=self.scale)


class Branches:
    """The adapters that one part of the model computes next to its layers."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._groups: tuple[Group, ...] = ()  # those with adapters
        self._rows = 0  # of all groups
        self._handles: list[RemovableHandle] = []
        self._placed: OrderedDict[Hashable, list[tuple[Tensor, Tensor]]] = OrderedDict()

    def use(self, groups: Sequence[Group]) -> None:
        """Makes the layers add the changes of these groups from now on.

        If it raises, for example for lack of memory, no layer adds anything.
        """
        wanted = tuple(group for group in groups if group.adapters)
        rows = sum(group.count for group in groups)
        if wanted == self._groups and (rows == self._rows or not wanted):
            return
        self._groups = ()
        while self._handles:
            self._handles.pop().remove()
        pieces: dict[nn.Module, list[_Piece]] = {}
        for group in wanted:
            for adapter in group.adapters:
                for low, (down, up) in self._factors(adapter):
                    piece = _Piece(group, rows, down, up, adapter.scale * low.factor)
                    pieces.setdefault(low.layer, []).append(piece)
        for layer, own in pieces.items():
            self._handles.append(layer.register_forward_hook(_hook(own)))
        self._groups, self._rows = wanted, rows
        self._evict()

    def clear_cache(self) -> None:
        """Drops the factors on the device that are not in use."""
        self._evict(0)

    def _factors(self, adapter: Adapter) -> list[tuple[LowRank, tuple[Tensor, Tensor]]]:
        content = content_of(adapter)
        branches = content.branches[self._part] or ()
        placed = self._placed.get(adapter.content)
        if placed is None:
            placed = [(_like(low, low.down), _like(low, low.up)) for low in branches]
            self._placed[adapter.content] = placed
        self._placed.move_to_end(adapter.content)
        return list(zip(branches, placed, strict=True))

    def _evict(self, most: int = _PLACED_BYTES) -> None:
        used = {each.content for group in self._groups for each in group.adapters}
        sizes = {
            content: sum(down.nbytes + up.nbytes for down, up in placed)
            for content, placed in self._placed.items()
        }
        idle = [content for content in self._placed if content not in used]
        while idle and sum(sizes[content] for content in idle) > most:
            del self._placed[idle.pop(0)]


def _like(low: LowRank, factor: Tensor) -> Tensor:
    """Returns a factor on the device and in the type of its layer."""
    weight = low.layer.weight
    assert isinstance(weight, Tensor)
    return factor.to(weight.device, weight.dtype)


def _hook(pieces: Sequence[_Piece]) -> Callable[[nn.Module, Any, Any], None]:
    def add(layer: nn.Module, arguments: Any, output: Any) -> None:
        for piece in pieces:
            piece.add(layer, arguments[0], output)

    return add
