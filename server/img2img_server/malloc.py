"""Sets how glibc's malloc treats large freed blocks. Other C libraries are left unchanged."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # constants of malloc.h
_M_MMAP_THRESHOLD: Final = -3


def return_large_blocks() -> None:
    """Makes malloc return blocks of 2 MiB and more to the system as soon as they are freed.

    By default this threshold grows to 32 MiB, and the heap keeps hundreds of megabytes after some
    large requests. A 512x512 image is below the threshold, and up to 8 MiB of freed heap are kept,
    because new pages for each image would add 2 ms to a request.
    """
    _set(mmap_bytes=2 * 2**20, trim_bytes=8 * 2**20)


def keep_freed_memory() -> None:
    """Makes malloc keep freed blocks, for a process that denoises on the CPU.

    Otherwise a decode at 512x512 was measured to spend a fifth of its time on page faults.
    """
    _set(mmap_bytes=2**30, trim_bytes=2**31 - 1)


def trim() -> None:
    """Returns freed memory to the system, also where malloc would keep it."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(*, mmap_bytes: int, trim_bytes: int) -> None:
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, mmap_bytes)
        mallopt(_M_TRIM_THRESHOLD, trim_bytes)
