"""Releases the memory of weights that were read from a file and are no longer needed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

FileMaps = Sequence[tuple[int, int]]  # the first address and the end of each

_MAPS = Path("/proc/self/maps")
_DONT_NEED = 4  # the constant MADV_DONTNEED of Linux


def use_channels_last(network: torch.nn.Module) -> None:
    """Converts the weights of convolutions to the channels-last layout, without a second copy of
    all of them.

    diffusers maps the files of a model into memory, and a map keeps its pages as long as one of its
    tensors is in use. So the pages of each copied tensor are released one by one.
    """
    maps = file_maps()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim != 4:
            continue
        old = tensor.data
        tensor.data = old.contiguous(memory_format=torch.channels_last)
        if tensor.data.data_ptr() != old.data_ptr():
            drop_file_pages(old, maps)


def leave_files(network: torch.nn.Module) -> None:
    """Copies the weights that are mapped from a file into memory, one tensor after the other.

    Otherwise a file that is overwritten changes the images, and one that is cut off ends the
    process.
    """
    maps = file_maps()
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        old = tensor.data
        if type(old) is not Tensor or old.device.type != "cpu" or not old.numel():
            continue
        if not _is_inside(maps, old.data_ptr(), old.data_ptr() + old.nbytes):
            continue
        key = old.data_ptr(), old.shape, old.stride()
        if key not in copies:  # Tied weights share their memory.
            copies[key] = old.clone()
            drop_file_pages(old, maps)
        tensor.data = copies[key]


def drop_file_pages(tensor: Tensor, maps: FileMaps) -> None:
    """Releases the pages of a tensor in a mapped file. Does nothing to any other tensor.

    A later access reads the file again. Only pages without other data are released.

    Args:
        maps: Those of a moment since which the tensor exists; reading them takes longer than the
            rest.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end <= begin or not _is_inside(maps, begin, end):
        return
    with suppress(AttributeError, OSError):
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED)


def file_maps() -> FileMaps:
    """Returns the first address and the end of each map of a file in this process."""
    try:
        lines = _MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # The file exists on Linux only.
        return []
    found = []
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append((first, last))
    return found


def _is_inside(maps: FileMaps, begin: int, end: int) -> bool:
    """Returns whether these addresses are in one map of a file."""
    return any(first <= begin and end <= last for first, last in maps)
