"""Copies of images from the device to the host, while the device continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from img2img_server.errors import EngineError
from img2img_server.imaging.base import Pixels


@dataclass(frozen=True, slots=True, eq=False)
class HostCopy:
    """An image of a Denoiser in the memory of the host.

    Attributes:
        host: height x width x 3, uint8.
        is_finite: One bool on the host; None: not checked.
        arrived: A device event that is recorded after both copies; None: both are complete.
    """

    host: Tensor
    is_finite: Tensor | None
    arrived: torch.cuda.Event | None

    @property
    def is_ready(self) -> bool:
        return self.arrived is None or bool(self.arrived.query())  # type: ignore[no-untyped-call]

    def pixels(self) -> Pixels:
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.is_finite is not None and not bool(self.is_finite):
            raise EngineError("the image has values that are not finite")
        pixels: Pixels = self.host.numpy()
        # Pinned memory is expensive, so it is reused once no caller holds a copy.
        return pixels if self.arrived is None else pixels.copy()


def copy_to_host(pixels: Tensor, is_finite: Tensor | None = None) -> Sequence[HostCopy]:
    """Starts copies of images to the host and does not wait for them.

    Args:
        pixels: n x height x width x 3, uint8.
        is_finite: n bools, whether the values of the image are finite; None: not checked.
    """
    arrived = None
    if pixels.device.type == "cuda":
        pixels = _pinned(pixels)
        is_finite = None if is_finite is None else _pinned(is_finite)
        # A blocking event: the thread that waits for it sleeps instead of polling.
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrived.record()
    return [
        HostCopy(pixels[i], None if is_finite is None else is_finite[i], arrived)
        for i in range(len(pixels))
    ]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to the device, without waiting for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
