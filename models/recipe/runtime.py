"""Common code of the training scripts: the device, a clock that sets the learning rate, and atomic
saving.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def device() -> torch.device:
    """Returns the GPU, or the CPU with ATELIER_THREADS threads (default: all)."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if "ATELIER_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["ATELIER_THREADS"]))
    return torch.device("cpu")


class Threads:
    """Chooses the number of threads: measures one thread and all threads from time to time, and
    uses the faster number.

    If another process uses a core, each operation with two threads waits for the slower thread.
    """

    def __init__(self, trial: int = 10, period: int = 400) -> None:
        self.most, self.trial, self.period = torch.get_num_threads(), trial, period
        self._seconds: dict[int, list[float]] = {}

    def stepped(self, step: int, seconds: float) -> None:
        """Records the duration of a step; call it after every step."""
        if self.most == 1:
            return
        phase = step % self.period
        if phase < 2 * self.trial:
            self._seconds.setdefault(torch.get_num_threads(), []).append(seconds)
        if phase == 0:
            torch.set_num_threads(1)
        elif phase == self.trial:
            torch.set_num_threads(self.most)
        elif phase == 2 * self.trial:
            means = {count: sum(v) / len(v) for count, v in self._seconds.items()}
            torch.set_num_threads(min(means, key=lambda count: means[count]))
            self._seconds.clear()


class Clock:
    """The clock of a training, which is limited by minutes. `spent`: the minutes of earlier runs.

    The training also continues until `at_least` steps are done, on a machine of any speed.
    """

    def __init__(self, minutes: float, spent: float = 0.0, at_least: int = 0) -> None:
        self.minutes, self.at_least, self.steps = minutes, at_least, 0
        self._start = time.monotonic() - 60 * spent

    @property
    def spent(self) -> float:
        return (time.monotonic() - self._start) / 60

    @property
    def done(self) -> float:
        """Returns the finished share of the training, 0..1."""
        shares = [self.spent / self.minutes] if self.minutes else []
        shares += [self.steps / self.at_least] if self.at_least else []
        return min([1.0, *shares])

    def tick(self) -> bool:
        """Counts a step; returns false at the end of the training."""
        self.steps += 1
        return self.done < 1 or self.steps <= self.at_least

    def rate(self, warmup: float = 0.02, floor: float = 0.02) -> float:
        """Returns the factor of the learning rate: linear warm-up, then half a cosine."""
        done = self.done
        if done < warmup:
            return max(floor, done / warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
        return max(floor, cosine)

    def __str__(self) -> str:
        return f"{self.spent:.1f}/{self.minutes:g} min"


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a temporary file, then renames it, so that no incomplete file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Updates an exponential moving average that starts fast."""
    factor = min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - factor)
