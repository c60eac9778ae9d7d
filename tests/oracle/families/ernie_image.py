"""ERNIE-Image, compared with the stock text-to-image pipeline at strength 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen3Config, Qwen3Model

from img2img_server.engine.base import EngineJob
from tests.engine_bench import text_to_image_call
from tests.oracle.harness import OracleModel
from tests.tiny_flow import SIZES, lively
from tests.tiny_models import perturb_norms, save, vivid
from tests.tiny_qwen import TEXT_WIDTH, qwen_tokenizer, text_options


def write(folder: Path) -> Path:
    """Writes a model of the ERNIE-Image kind; returns its folder."""
    torch.manual_seed(12)
    tokenizer = qwen_tokenizer()
    tokenizer.model_max_length = 128
    encoder = Qwen3Model(Qwen3Config(**text_options(tokenizer), head_dim=8)).eval()
    perturb_norms(encoder)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=48,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(8, 8, 8),
    )
    for layer in (transformer.adaLN_modulation[-1], transformer.final_linear):
        torch.nn.init.normal_(layer.weight, std=0.1)
        torch.nn.init.normal_(layer.bias, std=0.1)
    pipeline = ErnieImagePipeline(
        vae=_autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return save(pipeline, folder)


def _autoencoder() -> Any:
    blocks = 4
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.3)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vivid(vae)


def call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline."""
    return text_to_image_call(wanted, channels=16, side_scale=16)


MODELS = {
    "ernie-image": OracleModel(
        write,
        guidance_scales=(1.0, 1.5, 4.0),
        sizes=SIZES,
        call=call,
        runs=((1.0, 1), (1.0, 2), (1.0, 5), (1.0, 11), (1.0, 28)),
    )
}
