"""The denoiser: a small UNet2DConditionModel that predicts v from the latents.

The pooled text also modulates every block together with the time (`addition_embed_type="text"`),
so that a style reaches the full-resolution level, which has no attention.
"""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from recipe.encoder import LATENT_CHANNELS
from recipe.text import WIDTH as TEXT_WIDTH

CHANNELS = (64, 96, 128)


def new_unet(channels: tuple[int, ...] = CHANNELS) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        attention_head_dim=4,  # number of heads; diffusers' old argument name is misleading
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=16,
    )
