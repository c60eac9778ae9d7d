"""Which batches fit the device, by the peaks that were measured. Pure but for the meter of a GPU.

What a step needs beyond the model itself grows with pixels x forwards. The peak of each shape is
measured when it first runs, in the warm-up or later; for shapes that have not run yet it is taken
in proportion from the largest that has. Pictures that do not fit the autoencoder pass it in tiles
instead (diffusers_autoencoder.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

Shape = tuple[int, int, int]  # height, width, forwards
# Of what is free, for what the allocator loses between blocks.
_USABLE = 0.95


class MemoryProbe(Protocol):
    """Looks at a device's memory, without waiting for it. Bytes."""

    @property
    def free(self) -> int | None:
        """What could be allocated now; None: not known, everything is let in."""
        ...

    def start(self) -> None:
        """Begins to watch."""
        ...

    def peak(self) -> int:
        """The most that was in use since `start`, beyond what was in use then."""
        ...


class NoProbe:
    """Of a CPU, where memory is the system's and other processes have their part of it."""

    @property
    def free(self) -> int | None:
        return None

    def start(self) -> None:
        """Nothing to begin."""

    def peak(self) -> int:
        return 0


class CudaProbe:
    """Of a GPU, by torch's allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    @property
    def free(self) -> int | None:
        unused = torch.cuda.memory_reserved(self._device)
        unused -= torch.cuda.memory_allocated(self._device)
        return int(torch.cuda.mem_get_info(self._device)[0]) + unused

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before


def meter_of(device: torch.device) -> MemoryProbe:
    """The meter of a device."""
    return CudaProbe(device) if device.type == "cuda" else NoProbe()


class MemoryModel:
    """Peaks of one model on one device. For the engine's thread.

    Args:
        limit_bytes: of what is free, no more than this is used; 0: no such limit.
    """

    def __init__(self, meter: MemoryProbe, limit_bytes: int = 0) -> None:
        self._meter = meter
        self._limit_bytes = limit_bytes
        self._peaks: dict[Shape, int] = {}

    @contextmanager
    def measured(self, height: int, width: int, forwards: int) -> Iterator[None]:
        """Notes the peak of what runs inside, if it ends well."""
        self._meter.start()
        yield
        shape = (height, width, forwards)
        if peak := self._meter.peak():
            self._peaks[shape] = max(peak, self._peaks.get(shape, 0))

    def need(self, height: int, width: int, forwards: int) -> int | None:
        """Bytes that such a batch needs at its peak; None when nothing was measured yet."""
        shape = (height, width, forwards)
        if shape in self._peaks or not self._peaks:
            return self._peaks.get(shape)
        largest = max(self._peaks, key=_work)
        return self._peaks[largest] * _work(shape) // _work(largest)

    def shortfall(self, height: int, width: int, forwards: int) -> int | None:
        """What such a batch needs if that is more than there is; None when it fits or who knows."""
        need, usable = self.need(height, width, forwards), self._usable()
        return need if need is not None and usable is not None and need > usable else None

    def max_forwards(
        self, height: int, width: int, most: int, padded_batch_size: Callable[[int], int] = int
    ) -> int:
        """Returns the most forwards up to `most` that fit in one batch; at least 1.

        Args:
            padded_batch_size: how many forwards run for a batch of so many.
        """
        sizes = range(most, 1, -1)
        return next(
            (n for n in sizes if self.shortfall(height, width, padded_batch_size(n)) is None), 1
        )

    def _usable(self) -> int | None:
        free = self._meter.free
        if free is None:
            return self._limit_bytes or None
        usable = int(free * _USABLE)
        return min(usable, self._limit_bytes) if self._limit_bytes else usable


def _work(shape: Shape) -> int:
    height, width, forwards = shape
    return height * width * forwards
