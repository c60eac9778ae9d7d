"""Autoencoders that several families share and that differ from Stable Diffusion's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from img2img_server.engine.diffusers.vae import Autoencoder


def one_frame(vae: Any, tile_pixels: int) -> Autoencoder:
    """Returns the autoencoder of Qwen-Image, which is one of videos: an image is one frame."""
    from img2img_server.engine.diffusers.vae import Autoencoder

    class OneFrame(Autoencoder):
        def run_encode(self, images: Tensor) -> Any:
            encoded = self._vae.encode(images.unsqueeze(2)).latent_dist
            return _encoding(encoded.parameters.squeeze(2))

        def run_decode(self, latents: Tensor) -> Tensor:
            frames: Tensor = self._vae.decode(latents.unsqueeze(2)).sample
            return frames.squeeze(2)

    return OneFrame(vae, tile_pixels)


def patches(vae: Any, tile_pixels: int, epsilon: float) -> Autoencoder:
    """Returns the autoencoder of FLUX.2, with 2 x 2 latents as the channels of one.

    Args:
        epsilon: The number that the pipeline adds to the variances by which it scales.
    """
    import torch
    from torch.nn.functional import pixel_shuffle, pixel_unshuffle

    from img2img_server.engine.diffusers.vae import Autoencoder

    class Patches(Autoencoder):
        def __init__(self, vae: Any, tile_pixels: int) -> None:
            super().__init__(vae, tile_pixels)
            self.side_scale *= 2

        def run_encode(self, images: Tensor) -> Any:
            parameters = self._vae.encode(images).latent_dist.parameters
            mean, spread = parameters.chunk(2, dim=1)
            return _encoding(torch.cat([pixel_unshuffle(mean, 2), pixel_unshuffle(spread, 2)], 1))

        def run_decode(self, latents: Tensor) -> Tensor:
            return super().run_decode(pixel_shuffle(latents, 2))

        def scaling(self, config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
            norm = self._vae.bn
            shift = norm.running_mean.float().reshape(1, -1, 1, 1)
            scale = (norm.running_var.float() + epsilon).rsqrt().reshape(1, -1, 1, 1)
            return shift.to(device), scale.to(device)

    return Patches(vae, tile_pixels)


def _encoding(parameters: Tensor) -> Any:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))
