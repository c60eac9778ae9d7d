"""Isolates a failing row: runs halves of a failed batch until the failing rows are alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from img2img_server.engine.base import EngineJob
from img2img_server.errors import EngineError, OutOfMemoryError

T = TypeVar("T")

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bisect_failures(
    items: Sequence[T],
    work: Callable[[Sequence[T]], None],
    before_retry: Callable[[Sequence[T], bool], None],
) -> list[tuple[T, Exception]]:
    """Does the work on all items at once. If that fails, does it on halves, down to single items.

    Args:
        work: must change nothing when it raises.
        before_retry: called with items that failed together, and whether the error was out of
            memory; frees memory of the failed attempt.

    Returns:
        The items that fail alone, each with its error. For all others the work is done.
    """
    if not items:
        return []
    try:
        work(items)
    except Exception as error:  # The other items continue after any error.
        if len(items) == 1:
            return [(items[0], error)]
        lacked_memory = is_out_of_memory(error)
    else:
        return []
    # The retry is outside of the except block, whose traceback would keep the tensors of the failed
    # attempt alive.
    before_retry(items, lacked_memory)
    middle = len(items) // 2
    return [
        *bisect_failures(items[:middle], work, before_retry),
        *bisect_failures(items[middle:], work, before_retry),
    ]


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether the device or the host had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator has no exception class.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def needed_bytes(error: Exception) -> int | None:
    """Returns how much memory was requested, if the message names it.

    >>> needed_bytes(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …"))
    2684354560
    >>> needed_bytes(RuntimeError("… you tried to allocate 1024 bytes. Error code 12"))
    1024
    """
    found = re.search(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
    if not found:
        return None
    return int(float(found[1]) * _UNITS.get(found[2], 1))


def device_works(device: torch.device) -> bool:
    """Returns whether the device can still compute.

    Some CUDA errors (an illegal address, a failed assertion in a kernel, a GPU that is lost on the
    PCI bus) leave a context in which every later call fails.
    """
    if device.type != "cuda":
        return True
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


def failure_of(error: Exception, job: EngineJob) -> Exception:
    """Returns the error that the job's caller gets for an error in the loop."""
    if is_out_of_memory(error):
        return OutOfMemoryError(job.width, job.height, needed_bytes(error))
    if isinstance(error, ValueError):
        # A scheduler raises this error for options that it does not support.
        return EngineError(str(error))
    return error
