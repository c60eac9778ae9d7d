"""Defines the noise schedule and the effect of strength.

Noise grows slowly through most of the time and reaches pure noise only at the end, so that strength
0.7 keeps the layout of the photo and 1.0 nothing of it. The styled share grows in the same way: the
denoiser learns to move a latent towards its style by `style_share`.
"""

from __future__ import annotations

import torch

STEPS = 1000
LAST_SIGNAL = 2.0**-12  # not zero, because schedulers divide by it


def noise_level(tau: torch.Tensor) -> torch.Tensor:
    """Returns the deviation of the noise at time tau in 0..1; signal is sqrt(1 - noise^2)."""
    return 0.55 * tau**1.1 + 0.45 * tau**12


def style_share(tau: torch.Tensor) -> torch.Tensor:
    """Returns the share of a full prediction's move from photo to style: 0 at 0, 1 from 0.75 on."""
    x = (tau / 0.75).clamp(0, 1)
    return x * x * (3 - 2 * x)


def levels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns signal, noise and style share of the timesteps 0..999, float32."""
    tau = (torch.arange(STEPS, dtype=torch.float64) + 1) / STEPS
    noise = noise_level(tau)
    signal = (1 - noise**2).clamp_min(0).sqrt().clamp_min(LAST_SIGNAL)
    noise = (1 - signal**2).sqrt()
    return signal.float(), noise.float(), style_share(tau).float()


def betas() -> list[float]:
    """Returns the schedule as `trained_betas` for any diffusers scheduler."""
    tau = (torch.arange(STEPS, dtype=torch.float64) + 1) / STEPS
    kept = (1 - noise_level(tau) ** 2).clamp_min(LAST_SIGNAL**2)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return (1 - kept / before).tolist()
