"""The autoencoder of a diffusers pipeline: pictures to latents and back, large ones in tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from img2img_server.engine.isolation import is_out_of_memory


class Autoencoder:
    """Latents as the sampler wants them: scaled, float32.

    A picture of more pixels than `tile_pixels` passes in tiles of the model's own size, which
    overlap and are blended: bounded memory for small differences. The same is tried when one
    picture alone does not fit the device, and kept for its size and larger ones.

    Args:
        vae: an AutoencoderKL or AutoencoderTiny, on its device.
    """

    def __init__(self, vae: Any, tile_pixels: int) -> None:
        self._vae = vae
        self._tile_pixels = tile_pixels
        self._dtype = vae.dtype
        self._shift, self._scale = _latent_scaling(vae.config, torch.device(vae.device))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the latents; None: it has no spread.

        Args:
            images: n x 3 x h x w in -1..1.
        """
        encoded = self._tiled_when_large(self._vae.encode, images.to(self._dtype), pixels_per=1)
        if hasattr(encoded, "latent_dist"):
            mean, deviation = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
            return (mean - self._shift) * self._scale, deviation * self._scale
        return (encoded.latents.float() - self._shift) * self._scale, None

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about -1..1, float32."""
        scaled = (latents / self._scale + self._shift).to(self._dtype)
        images: Tensor = self._tiled_when_large(self._vae.decode, scaled, pixels_per=64).sample
        return images.float()

    def _tiled_when_large(
        self, work: Callable[[Tensor], Any], inputs: Tensor, pixels_per: int
    ) -> Any:
        pixels = inputs.shape[2] * inputs.shape[3] * pixels_per
        self._vae.use_tiling = pixels > self._tile_pixels
        try:
            return work(inputs)
        except Exception as error:
            alone = len(inputs) == 1
            if self._vae.use_tiling or not alone or not is_out_of_memory(error):
                raise
        # Out of the handler: its traceback would keep the tensors of the failed attempt alive.
        if inputs.device.type == "cuda":
            torch.cuda.empty_cache()
        self._tile_pixels, self._vae.use_tiling = pixels - 1, True
        return work(inputs)


def _latent_scaling(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and scale: latents = (encoded - shift) * scale. Only a few SDXL models shift."""
    scale = torch.tensor(float(config.scaling_factor), device=device)
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return torch.zeros((), device=device), scale
    shift = torch.tensor(mean, device=device).reshape(1, -1, 1, 1)
    return shift, scale / torch.tensor(deviation, device=device).reshape(1, -1, 1, 1)
