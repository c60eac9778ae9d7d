"""Exports the memory of the worker's device as a metric."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch

from img2img_server.telemetry import DEVICE_MEMORY_BYTES

STATES: Final = ("used", "free", "total")


def watch_memory(device: torch.device) -> None:
    """Exports the memory of the device. It is read when Prometheus asks for it."""
    read = partial(_of_gpu, device) if device.type == "cuda" else _of_machine
    for state in STATES:
        DEVICE_MEMORY_BYTES.labels(str(device), state).set_function(partial(_value, read, state))


def _value(read: Callable[[], dict[str, int]], state: str) -> float:
    """Returns one number; not a number if the device is lost, so that the other metrics remain."""
    try:
        return float(read()[state])
    except (RuntimeError, OSError, KeyError, ValueError):
        return math.nan


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process had in use so far: on a GPU, those that torch has
    reserved; otherwise, those of the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _of_gpu(device: torch.device) -> dict[str, int]:
    free, total = torch.cuda.mem_get_info(device)
    return {"used": torch.cuda.memory_reserved(device), "free": free, "total": total}


def _of_machine() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = {name: int(value.split()[0]) * 1024 for name, value in (x.split(":") for x in lines)}
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "used": pages * os.sysconf("SC_PAGE_SIZE"),
        "free": found["MemAvailable"],
        "total": found["MemTotal"],
    }
