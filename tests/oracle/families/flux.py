"""FLUX.1 dev and schnell."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from img2img_server.engine.base import EngineJob
from tests.oracle.harness import OracleModel
from tests.tiny_flow import (
    DYNAMIC_SHIFT,
    SIZES,
    T5_WIDTH,
    autoencoder,
    lively,
    sized_call,
    t5_encoder,
    t5_tokenizer,
)
from tests.tiny_models import WIDTH, clip_tokenizer, save, text_config


def write(folder: Path, *, takes_guidance: bool, scheduler: dict[str, Any]) -> Path:
    """Writes a model of the FLUX.1 kind; returns its folder."""
    torch.manual_seed(3)
    tokenizer, tokenizer_2 = clip_tokenizer(folder / "words"), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=takes_guidance,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = FluxPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
        text_encoder_2=t5_encoder(tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    )
    return save(pipeline, folder)


def call_with_true_cfg(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline for requests with true_cfg_scale."""
    return {**sized_call(wanted), "true_cfg_scale": wanted.params.true_cfg_scale or 1.0}


MODELS = {
    "flux dev with true_cfg_scale": OracleModel(
        partial(write, takes_guidance=True, scheduler=DYNAMIC_SHIFT),
        guidance_scales=(1.0, 3.5, 7.0),
        sizes=SIZES,
        call=call_with_true_cfg,
        options={"true_cfg_scale": 2.5},
    ),
    "flux dev": OracleModel(
        partial(write, takes_guidance=True, scheduler=DYNAMIC_SHIFT),
        guidance_scales=(1.0, 3.5, 7.0),
        sizes=SIZES,
        call=sized_call,
    ),
    "flux schnell": OracleModel(
        partial(write, takes_guidance=False, scheduler={"shift": 1.0}),
        guidance_scales=(0.0, 0.0, 0.0),
        sizes=SIZES,
        call=sized_call,
    ),
}
