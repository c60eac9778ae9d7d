"""Writes the changes of LoRAs into the weights, and restores the weights of the model.

Steps take as long as without a LoRA, but all rows of a batch have the same ones. The first use
keeps a copy of each weight it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.lora_forms import Change
from img2img_server.engine.diffusers.lora_layers import Part, content_of


@dataclass(slots=True)
class _Kept:
    """A weight and its original value, without any adapter."""

    weight: Tensor
    original: Tensor


class WrittenLoras:
    """The adapters that are in the weights of one part of the model."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._kept: dict[int, _Kept] = {}
        self._written: tuple[Adapter, ...] = ()
        self._is_half_written = False

    @property
    def present(self) -> tuple[Adapter, ...]:
        """Returns the adapters that are in the weights."""
        return self._written

    def use(self, adapters: Sequence[Adapter]) -> None:
        """Writes the weights with the sum of the changes of these adapters. None of them restores
        the weights of the model.

        If it raises, for example for lack of memory, the next use writes all weights again.

        Raises:
            EngineError: There was no file when an adapter was made.
        """
        wanted = tuple(adapters)
        parts = [(content_of(each).changes[self._part], each.scale) for each in wanted]
        if wanted == self._written and not self._is_half_written:
            return
        self._is_half_written = True
        for kept in self._kept.values():
            kept.weight.copy_(kept.original)
        for changes, scale in parts:
            self._write(changes, scale)
        self._written = wanted
        self._is_half_written = False

    def _write(self, changes: tuple[Change, ...], scale: float) -> None:
        for change in changes:
            # Several LoRAs share one copy, also where each has a tensor object of its own.
            key = change.weight.data_ptr()
            if key not in self._kept:
                self._kept[key] = _Kept(change.weight, change.weight.clone())
            original = self._kept[key].original
            change.weight.copy_(change.weight.float() + change.delta(original, scale))
