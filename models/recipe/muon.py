"""Muon: momentum, made orthogonal for every weight matrix (Keller Jordan, 2024).

Here it needs 500 steps for a loss that takes AdamW 2,500 steps. A convolution is treated as a
matrix of its outputs by all other dimensions, which `torch.optim.Muon` does not support. Biases,
norms, embeddings and the first and last layers use AdamW, as its author advises.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

COLOURS = 3
# coefficients of the quintic Newton-Schulz iteration, from the author's code
_A, _B, _C = 3.4445, -4.7750, 2.0315


def _orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Returns approximately the nearest matrix with singular values of 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"]).reshape(len(weight), -1)
                tall = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                change = _orthogonal(ahead).reshape(weight.shape)
                weight.add_(change, alpha=-group["lr"] * tall)


def optimizers(
    model: nn.Module, rate: float, adam_rate: float, rim: tuple[str, ...] = ()
) -> list[torch.optim.Optimizer]:
    """Returns a Muon optimizer for inner matrices, and AdamW for vectors and for weights whose
    names contain an entry of `rim`.
    """
    inner, others = [], []
    for name, weight in model.named_parameters():
        within = weight.ndim >= 2 and min(weight.shape[:2]) > COLOURS
        (inner if within and not any(word in name for word in rim) else others).append(weight)
    chosen = [Muon(inner, rate), torch.optim.AdamW(others, adam_rate, (0.9, 0.98), weight_decay=0)]
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["full"] = group["lr"]
    return chosen


def set_rate(chosen: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every group to this share of its full learning rate."""
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * factor
