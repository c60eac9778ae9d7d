"""What every training script needs: the device, a clock that also sets the rate, safe saving."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def device() -> torch.device:
    """The GPU where there is one, else the CPU on ATELIER_THREADS threads (default: all)."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if "ATELIER_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["ATELIER_THREADS"]))
    return torch.device("cpu")


class Threads:
    """Now and then tries one thread and all, and keeps the faster: others may use the cores.

    With a core taken away, every operation of two threads waits for the slower one.
    """

    def __init__(self, trial: int = 10, period: int = 400) -> None:
        self.most, self.trial, self.period = torch.get_num_threads(), trial, period
        self._seconds: dict[int, list[float]] = {}

    def stepped(self, step: int, seconds: float) -> None:
        """To be called after every step with its duration."""
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
    """Training is bounded by minutes; `spent` are the minutes of earlier, resumed runs.

    With `at_least` steps it goes on until those are done too, however slow the machine.
    """

    def __init__(self, minutes: float, spent: float = 0.0, at_least: int = 0) -> None:
        self.minutes, self.at_least, self.steps = minutes, at_least, 0
        self._start = time.monotonic() - 60 * spent

    @property
    def spent(self) -> float:
        return (time.monotonic() - self._start) / 60

    @property
    def done(self) -> float:
        """Share of the training that is behind us, 0..1."""
        shares = [self.spent / self.minutes] if self.minutes else []
        shares += [self.steps / self.at_least] if self.at_least else []
        return min([1.0, *shares])

    def tick(self) -> bool:
        """Counts a step; false when the training is over."""
        self.steps += 1
        return self.done < 1 or self.steps <= self.at_least

    def rate(self, warmup: float = 0.02, floor: float = 0.02) -> float:
        """Factor of the learning rate: linear warm-up, then half a cosine over the time."""
        done = self.done
        if done < warmup:
            return max(floor, done / warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
        return max(floor, cosine)

    def __str__(self) -> str:
        return f"{self.spent:.1f}/{self.minutes:g} min"


def save(state: dict[str, Any], path: Path) -> None:
    """Writes beside the target, then renames: a cut never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average that starts fast."""
    factor = min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - factor)
