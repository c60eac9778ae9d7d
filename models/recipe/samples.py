"""The training samples of the denoiser: a latent between photo and style, with noise.

z = photo + u (styled - photo), u mostly 0 (an untouched photo) or 1 (ordinary diffusion);
x_t = signal z + noise eps; the clean target latent is z + share(t) (styled - z). The target of a
caption without a style is z itself, so the unconditional branch does not change the image and the
guidance scale says how strongly the style is applied.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from recipe.captions import caption, caption_without_look
from recipe.looks import NAMES
from recipe.schedule import STEPS, levels

CELL = 4  # size in latents; crops start on the textures' 32-pixel period
KEEP = 0.1  # share of captions without a style
# Styles that need more samples: fine lines and blocks, and the grey styles that look similar.
WEIGHTS = {
    "photo": 1.5,
    "pencil sketch": 1.5,
    "charcoal": 1.5,
    "ink drawing": 1.5,
    "cartoon": 3.5,
    "pixel art": 3.5,
    "black and white": 1.5,
    "neon": 2.0,
    "snow": 2.0,
}
BACK = 0.3  # share of captions that ask for a photo; lost colours cannot be restored
# Channels that change pixels more have more weight: their standard deviation to this power.
SEEN = 0.5
USED = 0.7  # part of the schedule that is used; beyond it the photo is lost, which few users need


@dataclass
class Batch:
    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    captions: list[str]


class Samples:
    """Endless batches from the latents (views x styles x channels x h x w).

    Args:
        deviations: how far each channel moves the pixels.
    """

    def __init__(self, latents: np.ndarray, seed: int, deviations: torch.Tensor) -> None:
        self.latents = torch.from_numpy(latents)
        seen = deviations**SEEN
        self.channels = (seen / seen.mean())[:, None, None]
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.signal, self.noise, self.share = levels()

    def _crop(self, side: int) -> tuple[torch.Tensor, torch.Tensor, str, bool]:
        view = self.rng.randrange(len(self.latents))
        (look,) = self.rng.choices(range(len(NAMES)), [WEIGHTS.get(n, 1.0) for n in NAMES])
        side = min(side, self.latents.shape[-1])
        corners = (self.latents.shape[-1] - side) // CELL + 1
        top, left = (CELL * self.rng.randrange(corners) for _ in range(2))
        window = (slice(None), slice(top, top + side), slice(left, left + side))
        keep = self.rng.random() < KEEP
        from_look = 0
        if look == 0 and self.rng.random() < BACK:
            # These samples start from any style and end at the photo.
            from_look = self.rng.randrange(len(NAMES))
        start = self.latents[view, from_look][window].float()
        end = self.latents[view, look][window].float()
        return start, end, NAMES[look], keep

    def _mix(self) -> float:
        draw = self.rng.random()
        if draw < 0.55:
            return 0.0
        return 1.0 if draw < 0.7 else self.rng.uniform(0, 1.2)

    def _steps(self, size: int) -> torch.Tensor:
        """Returns timesteps. Three of four are from the part that strengths up to 0.8 use."""
        tau = torch.rand(size, generator=self.generator)
        low = torch.rand(size, generator=self.generator) < 0.85
        return (STEPS * torch.where(low, USED * tau, USED + (1 - USED) * tau)).long()

    def batch(self, size: int, side: int) -> Batch:
        drawn = [self._crop(side) for _ in range(size)]
        start = torch.stack([crop[0] for crop in drawn])
        end = torch.stack([crop[1] for crop in drawn])
        keep = torch.tensor([float(crop[3]) for crop in drawn])[:, None, None, None]
        mix = torch.tensor([self._mix() for _ in drawn])[:, None, None, None]
        steps = self._steps(size)
        steps[torch.rand(size, generator=self.generator) < 0.03] = STEPS - 1
        signal, noise, share = (
            level[steps][:, None, None, None] for level in (self.signal, self.noise, self.share)
        )
        clean = start + mix * (end - start)
        eps = torch.randn(clean.shape, generator=self.generator)
        noisy = signal * clean + noise * eps
        wanted = clean + (1 - keep) * share * (end - clean)
        texts = [
            caption_without_look(self.rng) if crop[3] else caption(crop[2], self.rng)
            for crop in drawn
        ]
        return Batch(
            noisy=noisy,
            timesteps=steps,
            target=(signal * noisy - wanted) / noise,
            weight=self.channels * noise.square() / (noise.square() + 0.02),
            captions=texts,
        )
