"""Decides which batches fit the device, by measured peaks. Only the probe of a GPU has side
effects.

The memory of a step grows with pixels x forwards. The peak of each shape is measured when it first
runs, in the warm-up or later; for other shapes it is estimated in proportion to the largest shape
that was measured. Images that do not fit the autoencoder pass it in tiles (diffusers/vae.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from img2img_server.engine.turns import DeviceTurns

Shape = tuple[int, int, int]  # height, width and forwards of a batch
# share of the free memory that batches may use; the allocator loses the rest between blocks
_USABLE = 0.95


class MemoryProbe(Protocol):
    """Reads the memory of a device in bytes, without waiting for the device."""

    @property
    def free(self) -> int | None:
        """Returns the bytes that can be allocated now. None: unknown, so no batch is rejected."""
        ...

    def start(self) -> None:
        """Begins a measurement."""
        ...

    def peak(self) -> int:
        """Returns the peak since `start`, minus the memory that was in use then."""
        ...


class NoProbe:
    """A probe for the CPU, whose memory is shared with other processes: it measures nothing."""

    @property
    def free(self) -> int | None:
        return None

    def start(self) -> None:
        """Does nothing."""

    def peak(self) -> int:
        return 0


class CudaProbe:
    """The probe of a GPU, by torch's allocator and the driver."""

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


def probe_of(device: torch.device) -> MemoryProbe:
    """Returns the probe of a device."""
    return CudaProbe(device) if device.type == "cuda" else NoProbe()


class MemoryModel:
    """The peaks of one model on one device. Only the engine's thread calls it.

    Args:
        limit_bytes: The most memory to use; 0: all free memory.
        turns: The turns of the device, if it has more than one engine.
    """

    def __init__(
        self, probe: MemoryProbe, limit_bytes: int = 0, turns: DeviceTurns | None = None
    ) -> None:
        self._probe = probe
        self._limit_bytes = limit_bytes
        self._turns = turns or DeviceTurns()
        self._peaks: dict[Shape, int] = {}

    @contextmanager
    def measured(self, height: int, width: int, forwards: int) -> Iterator[None]:
        """Measures the peak memory of the body, unless it raises an error or another model is
        loaded meanwhile.
        """
        loads = self._turns.loads
        self._probe.start()
        yield
        shape = (height, width, forwards)
        is_disturbed = loads[0] > 0 or loads != self._turns.loads
        if (peak := self._probe.peak()) and not is_disturbed:
            self._peaks[shape] = max(peak, self._peaks.get(shape, 0))

    def need(self, height: int, width: int, forwards: int) -> int | None:
        """Returns the bytes of a batch at its peak; None: nothing was measured yet."""
        shape = (height, width, forwards)
        if shape in self._peaks or not self._peaks:
            return self._peaks.get(shape)
        largest = max(self._peaks, key=_work)
        return self._peaks[largest] * _work(shape) // _work(largest)

    def shortfall(self, height: int, width: int, forwards: int) -> int | None:
        """Returns the need of a batch that does not fit; None if it fits or none was measured."""
        need, usable = self.need(height, width, forwards), self._usable()
        return need if need is not None and usable is not None and need > usable else None

    def lasting_shortfall(self, height: int, width: int, forwards: int) -> int | None:
        """Returns the need of a batch that does not fit even while no other model runs a step or
        is loaded; None otherwise. It may wait for a turn.
        """
        if self.shortfall(height, width, forwards) is None:
            return None
        loads = self._turns.loads
        with self._turns.turn():  # A step of another model may have used the memory.
            need = self.shortfall(height, width, forwards)
        is_disturbed = loads[0] > 0 or loads != self._turns.loads
        return None if is_disturbed else need

    def max_forwards(
        self, height: int, width: int, most: int, padded_batch_size: Callable[[int], int] = int
    ) -> int:
        """Returns the most forwards up to `most` that fit in one batch; at least 1.

        Args:
            padded_batch_size: Returns the number of forwards that run for a batch size.
        """
        sizes = range(most, 1, -1)
        return next(
            (n for n in sizes if self.shortfall(height, width, padded_batch_size(n)) is None), 1
        )

    def _usable(self) -> int | None:
        free = self._probe.free
        if free is None:
            return self._limit_bytes or None
        usable = int(free * _USABLE)
        return min(usable, self._limit_bytes) if self._limit_bytes else usable


def _work(shape: Shape) -> int:
    height, width, forwards = shape
    return height * width * forwards
