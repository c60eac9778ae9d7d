"""The autoencoder of a diffusers pipeline: images to latents and back, large ones in tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from img2img_server.engine.isolation import is_out_of_memory


class Autoencoder:
    """Converts images to latents as the sampler expects them (scaled, float32) and back.

    An image of more pixels than `tile_pixels` passes in tiles of the model's own size, which
    overlap and are blended: bounded memory for small differences. Tiles are also used if one image
    alone does not fit the device, and from then on for images of this size and larger ones.

    Families with another autoencoder override `run_encode`, `run_decode` and `scaling`.

    Args:
        vae: An autoencoder of diffusers, on its device.

    Attributes:
        side_scale: Pixels of an image's side per latent.
    """

    def __init__(self, vae: Any, tile_pixels: int) -> None:
        self._vae = vae
        self._tile_pixels = tile_pixels
        self._dtype = vae.dtype
        self._shift, self._scale = self.scaling(vae.config, torch.device(vae.device))
        self.side_scale = _side_scale(vae)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns mean and deviation of the latents; the deviation is None if the output is
        deterministic.

        Args:
            images: n x 3 x h x w in -1..1.
        """
        encoded = self._tiled_when_large(self.run_encode, images.to(self._dtype), pixels_per=1)
        if hasattr(encoded, "latent_dist"):
            mean, deviation = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
            return (mean - self._shift) * self._scale, deviation * self._scale
        return (encoded.latents.float() - self._shift) * self._scale, None

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images in about -1..1, float32."""
        scaled = (latents / self._scale + self._shift).to(self._dtype)
        pixels_per = self.side_scale**2
        images: Tensor = self._tiled_when_large(self.run_decode, scaled, pixels_per=pixels_per)
        return images.float()

    def run_encode(self, images: Tensor) -> Any:
        """Returns the autoencoder's encoding of images, in the classes of diffusers."""
        return self._vae.encode(images)

    def run_decode(self, latents: Tensor) -> Tensor:
        """Returns the autoencoder's decoding of its own latents."""
        images: Tensor = self._vae.decode(latents).sample
        return images

    def scaling(self, config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns shift and scale: latents = (encoded - shift) * scale."""
        scale = torch.tensor(float(config.get("scaling_factor") or 1.0), device=device)
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            shift = float(config.get("shift_factor") or 0.0)
            return torch.tensor(shift, device=device), scale
        by_channel = torch.tensor(mean, device=device).reshape(1, -1, 1, 1)
        return by_channel, scale / torch.tensor(deviation, device=device).reshape(1, -1, 1, 1)

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
        # The retry is outside of the except block, whose traceback would keep the tensors of the
        # failed attempt alive.
        if inputs.device.type == "cuda":
            torch.cuda.empty_cache()
        self._tile_pixels, self._vae.use_tiling = pixels - 1, True
        return work(inputs)


def _side_scale(vae: Any) -> int:
    """Returns the pixels of an image's side per latent."""
    if ratio := getattr(vae, "spatial_compression_ratio", None):
        return int(ratio)
    return int(2 ** (len(vae.config.block_out_channels) - 1))
