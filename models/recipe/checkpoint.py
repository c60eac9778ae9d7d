"""The state of a training on disk: weights, their running average, the optimizers, steps and
minutes.

Weights are valid only for the latents of one encoder. A checkpoint of another encoder is rejected.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipe.encoder import encoder_key
from recipe.runtime import Clock, save

SAVE_EVERY_SECONDS = 60
State = dict[str, torch.Tensor]


class Checkpoint:
    """Resumes from `path` if it exists; `step` and `spent` (minutes) count all runs.

    Args:
        modules: `model` and `average`, and other trained modules.
    """

    def __init__(
        self,
        path: Path,
        modules: dict[str, nn.Module],
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        self.path, self.modules, self.optimizers = path, modules, optimizers
        self.encoder, self.step, self.spent = encoder_key(), 0, 0.0
        self._saved = time.monotonic()
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        state = read(self.path)
        for name, module in self.modules.items():
            if name in state:
                module.load_state_dict(state[name])
        for optimizer, reached in zip(self.optimizers, state.get("optimizers", ()), strict=False):
            # Only the state of the gradients is restored. The learning rates are those of this run.
            ours = optimizer.state_dict()
            optimizer.load_state_dict({**ours, "state": reached["state"]})
        self.step, self.spent = state["step"], state["spent"]
        print(f"{self.path.stem}: step {self.step}, {self.spent:.1f} min", flush=True)

    def keep(self, clock: Clock) -> None:
        self._saved = time.monotonic()
        state: dict[str, Any] = {name: m.state_dict() for name, m in self.modules.items()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        state |= {"encoder": self.encoder, "step": self.step, "spent": clock.spent}
        save(state, self.path)

    def stepped(self, clock: Clock) -> None:
        """Counts a step. Saves once a minute, so that SIGKILL loses at most the last minute."""
        self.step += 1
        if time.monotonic() - self._saved > SAVE_EVERY_SECONDS:
            self.keep(clock)


def read(path: Path) -> dict[str, Any]:
    """Reads the checkpoint. Raises SystemExit if there is none or it belongs to another encoder."""
    if not path.exists():
        raise SystemExit(
            f"{path} does not exist: train first, or start from the export (see README)"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["encoder"] != encoder_key():
        raise SystemExit(
            f"{path} was trained with another encoder: delete it, or restore that encoder"
        )
    return state


def averaged(path: Path) -> State:
    """Returns the averaged weights."""
    average: State = read(path)["average"]
    return average


def half(state: State) -> State:
    return {name: v.half() if v.is_floating_point() else v for name, v in state.items()}


def single(state: State) -> State:
    return {name: v.float() if v.is_floating_point() else v for name, v in state.items()}


def lay_down(path: Path, average: State, step: int = 0, spent: float = 0.0) -> None:
    """Writes a checkpoint of averaged weights to resume from; the encoder must exist."""
    weights = single(average)
    state = {"model": weights, "average": weights, "encoder": encoder_key()}
    save({**state, "step": step, "spent": spent}, path)
