"""Decides where the parts of a pipeline are kept: on the device, or on the host until they run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from img2img_server.engine.family import ModelError
from img2img_server.engine.options import ModelOptions, TextEncoderPlacement

_log = logging.getLogger(__name__)


def place(pipeline: Any, denoiser: str, device: torch.device, options: ModelOptions) -> None:
    """Moves each part of a pipeline to the place that the options set, one part after the other.

    Args:
        denoiser: The name of the part that denoises.

    Raises:
        ModelError: The denoiser cannot be offloaded.
    """
    stays = options.text_encoder_placement is TextEncoderPlacement.DEVICE
    for name, part in modules(pipeline).items():
        if name == denoiser and options.group_offload:
            offload_groups(part, device)
        elif stays or not name.startswith("text_encoder"):
            part.to(device)


def modules(pipeline: Any) -> Mapping[str, torch.nn.Module]:
    """Returns the networks of a pipeline by their names."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, torch.nn.Module)}


def offload_groups(network: Any, device: torch.device) -> None:
    """Keeps a network on the host; its blocks move to the device one after the other as they run.

    Raises:
        ModelError: The network cannot be divided into blocks.
    """
    streams = device.type == "cuda"  # Copies the next block while the present one runs.
    try:
        network.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            non_blocking=streams,
            use_stream=streams,
        )
    except (AttributeError, ValueError) as error:
        raise ModelError(
            f"{type(network).__name__} cannot be offloaded: {error}", setting="group_offload"
        ) from error


class TextEncoderOffload:
    """The text encoders of a pipeline, which may run on another device than the one that keeps
    them.

    Attributes:
        device: The device on which they run.
    """

    def __init__(
        self, pipeline: Any, device: torch.device, placement: TextEncoderPlacement
    ) -> None:
        self._parts = [
            part for name, part in modules(pipeline).items() if name.startswith("text_encoder")
        ]
        self._moves = placement is TextEncoderPlacement.OFFLOAD
        self.device = torch.device("cpu") if placement is TextEncoderPlacement.CPU else device

    def running(self) -> AbstractContextManager[None]:
        """Returns a context during which the text encoders are on the device on which they run."""
        return self._on_device() if self._moves else nullcontext()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        tensors = [
            tensor for part in self._parts for tensor in (*part.parameters(), *part.buffers())
        ]
        host = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield
        finally:
            # The weights have not changed, so they are not copied back.
            for tensor, kept in zip(tensors, host, strict=True):
                tensor.data = kept


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """A part of a loaded pipeline, with its memory in bytes."""

    name: str
    class_name: str
    bytes: int
    devices: str
    dtypes: str


def placed_parts(pipeline: Any) -> list[PlacedPart]:
    """Returns the parts of a pipeline and the memory of each."""
    found = []
    for name, part in modules(pipeline).items():
        tensors = (*part.parameters(), *part.buffers())
        size = sum(bytes_of(tensor.data) for tensor in tensors)
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        dtypes = ", ".join(
            sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.parameters()})
        )
        found.append(PlacedPart(name, type(part).__name__, size, devices, dtypes))
    return found


def log_parts(pipeline: Any) -> None:
    """Logs the memory of each part of a pipeline."""
    for part in placed_parts(pipeline):
        _log.info(
            "model_part_placed: %s: %s, %d MiB on %s as %s",
            *(part.name, part.class_name, part.bytes // 2**20, part.devices, part.dtypes),
        )


def bytes_of(tensor: Tensor) -> int:
    """Returns the memory of a tensor. For a quantised tensor, it is the sum of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.untyped_storage().nbytes() if tensor.is_contiguous() else tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(bytes_of(getattr(tensor, name)) for name in names)
