"""Lumina-Image 2.0, compared with the stock text-to-image pipeline at strength 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from img2img_server.engine.base import EngineJob
from img2img_server.engine.diffusers.families.lumina2 import _SYSTEM_PROMPT
from tests.engine_bench import text_to_image_call
from tests.oracle.families.sana_sprint import TEXT_WIDTH, gemma_encoder, gemma_tokenizer
from tests.oracle.harness import OracleModel
from tests.tiny_flow import SIZES, autoencoder, lively
from tests.tiny_models import save


def write(folder: Path) -> Path:
    """Writes a model of the Lumina 2 kind; returns its folder."""
    torch.manual_seed(9)
    tokenizer = gemma_tokenizer([_SYSTEM_PROMPT])
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 64, 64),
        cap_feat_dim=TEXT_WIDTH,
    )
    pipeline = Lumina2Pipeline(
        vae=autoencoder(),
        text_encoder=gemma_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )
    return save(pipeline, folder)


def call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline."""
    return text_to_image_call(wanted, channels=16)


MODELS = {
    "lumina 2": OracleModel(
        write,
        guidance_scales=(1.0, 1.5, 4.0),
        sizes=SIZES,
        call=call,
        runs=((1.0, 1), (1.0, 2), (1.0, 5), (1.0, 11), (1.0, 28)),
    )
}
