"""Identifies the weights of a model by their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_WIDTH = 4096  # words in a row
_SMALL_BYTES = 2**20


def fingerprint(parts: Mapping[str, torch.nn.Module]) -> str:
    """Returns a hash of all weights and buffers of some networks, by name.

    Large tensors on a GPU are hashed by the sums of their rows and columns, which it computes as
    fast as it reads its memory. So models that differ by accident, for example in their training or
    their number format, have different hashes. It is no protection against a forged model.
    """
    digest = hashlib.sha256()
    for part, network in sorted(parts.items()):
        tensors = (*network.named_parameters(), *network.named_buffers())
        for name, tensor in sorted(tensors, key=lambda each: each[0]):
            for piece in _pieces(tensor.detach()):
                digest.update(f"{part} {name} {piece.dtype} {tuple(piece.shape)}".encode())
                for numbers in _numbers(piece):
                    digest.update(numbers.cpu().numpy().data)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the plain tensors that a tensor consists of, for example its values and scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _pieces(getattr(tensor, name))
    else:
        yield tensor.as_subclass(Tensor)


def _numbers(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the bytes of a tensor, or the sums of a large one on a GPU."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if tensor.device.type == "cpu" or len(flat) <= _SMALL_BYTES:
        yield flat
    else:
        yield from sums(flat)


def sums(flat: Tensor) -> Iterator[Tensor]:
    """Yields the sums of the rows and columns of many bytes, and the bytes of the last row."""
    whole = len(flat) // (4 * _WIDTH) * (4 * _WIDTH)
    words = flat[:whole].view(torch.int32).reshape(-1, _WIDTH)
    yield words.sum(0, dtype=torch.int64)
    yield words.sum(1, dtype=torch.int64)
    yield flat[whole:]
