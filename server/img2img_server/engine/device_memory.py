"""Exports the memory of the worker's device as a metric."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Self

import torch

from img2img_server.telemetry import DEVICE_MEMORY_BYTES

STATES: Final = ("used", "free", "total")
_SAMPLE_SECONDS: Final = 0.005


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


class PeakMeter:
    """Measures the most bytes in use while it is open: on a GPU, those that torch has reserved;
    otherwise, those of the whole process, in samples.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-meter", daemon=True)
        self.peak = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_reserved(self._device)
            return
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(_SAMPLE_SECONDS)
            self.peak = max(self.peak, _process_bytes())


def _process_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _of_gpu(device: torch.device) -> dict[str, int]:
    free, total = torch.cuda.mem_get_info(device)
    return {"used": torch.cuda.memory_reserved(device), "free": free, "total": total}


def _of_machine() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = {name: int(value.split()[0]) * 1024 for name, value in (x.split(":") for x in lines)}
    return {
        "used": _process_bytes(),
        "free": found["MemAvailable"],
        "total": found["MemTotal"],
    }
