"""Decides how the LoRAs of a batch are applied: in the weights or next to the layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.lora_branch import Branches, Group
from img2img_server.engine.diffusers.lora_layers import Part, content_of
from img2img_server.engine.diffusers.lora_weights import WrittenLoras

# On a GPU a larger batch costs little, so computing a LoRA next to the layers is faster up to half
# of their work. On a CPU a larger batch saves hardly any time: it is faster only up to a twentieth,
# because no weights are written when the next row has another LoRA.
_MOST_WORK, _MOST_WORK_ON_A_CPU = 0.5, 0.05


def most_branch_work(device: torch.device, *, is_compiled: bool) -> float:
    """Returns the share of the work of its layers up to which a LoRA is computed next to them."""
    if is_compiled:
        return 0.0  # Layers of compiled models cannot be changed.
    return _MOST_WORK_ON_A_CPU if device.type == "cpu" else _MOST_WORK


class LoraUse:
    """The LoRAs of one part of the model.

    Args:
        most_work: A LoRA is computed next to the layers if its factors take at most this share of
            the work of the layers; 0: never.
    """

    def __init__(self, part: Part, most_work: float) -> None:
        self._part = part
        self._most_work = most_work
        self._weights = WrittenLoras(part)
        self._branches = Branches(part)

    def written(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        """Returns the adapters that must be in the weights. Rows share a batch only if these are
        the same.
        """
        return tuple(
            adapter for adapter in self.effective(adapters) if not self._has_branches(adapter)
        )

    def effective(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        """Returns the adapters that change this part of the model."""
        return tuple(
            adapter
            for adapter in adapters
            if adapter.content is None or content_of(adapter).changes[self._part]
        )

    def _has_branches(self, adapter: Adapter) -> bool:
        if adapter.content is None:
            return False
        return 0 < content_of(adapter).branch_work[self._part] <= self._most_work

    def use_for_all(self, adapters: Sequence[Adapter]) -> None:
        """Applies adapters to all inputs, of any number of rows."""
        self._weights.use(self.written(adapters))
        self._branches.use([Group(0, 0, self._added(adapters))])

    def use(self, rows: Sequence[tuple[Adapter, ...]]) -> Sequence[int]:
        """Applies the adapters of each row. Returns the order in which the rows must be: those with
        the same adapters are adjacent.

        Raises:
            EngineError: There was no file when an adapter was made.
        """
        if len(set(rows)) == 1:
            self.use_for_all(rows[0])
            return range(len(rows))
        places = {adapters: place for place, adapters in enumerate(dict.fromkeys(rows))}
        order = sorted(range(len(rows)), key=lambda index: places[rows[index]])
        (written,) = {self.written(adapters) for adapters in places}
        self._weights.use(written)
        groups, first = [], 0
        for adapters, members in groupby(order, key=lambda index: rows[index]):
            count = len(list(members))
            groups.append(Group(first, count, self._added(adapters)))
            first += count
        self._branches.use(groups)
        return order

    def _added(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        return tuple(adapter for adapter in adapters if self._has_branches(adapter))

    def clear_cache(self) -> None:
        """Drops copies on the device that are not in use."""
        self._branches.clear_cache()
