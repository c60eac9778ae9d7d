"""Z-Image and Z-Image-Turbo, which differ in the shift of their schedules."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.oracle.harness import OracleModel
from tests.tiny_flow import SIZES, autoencoder, lively
from tests.tiny_models import perturb_norms, save
from tests.tiny_qwen import TEXT_WIDTH, qwen_tokenizer, text_options


def write(folder: Path, *, shift: float) -> Path:
    """Writes a model of the Z-Image kind; returns its folder."""
    torch.manual_seed(5)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3Model(Qwen3Config(**text_options(tokenizer), head_dim=8)).eval()
    perturb_norms(encoder)
    transformer = ZImageTransformer2DModel(
        dim=48,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[1024, 64, 64],
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    pipeline = ZImagePipeline(
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    return save(pipeline, folder)


MODELS = {
    "z-image": OracleModel(partial(write, shift=6.0), guidance_scales=(0.0, 1.0, 4.0), sizes=SIZES),
    "z-image turbo": OracleModel(
        partial(write, shift=3.0), guidance_scales=(0.0, 0.5, 2.0), sizes=SIZES
    ),
}
