"""Chroma, with a schedule that is shifted by the size, and with a schedule of beta sigmas."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

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
from tests.tiny_models import save


def write(folder: Path, *, scheduler: dict[str, Any]) -> Path:
    """Writes a model of the Chroma kind; returns its folder."""
    torch.manual_seed(5)
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )
    pipeline = ChromaPipeline(
        vae=autoencoder(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    )
    return save(pipeline, folder)


MODELS = {
    "chroma": OracleModel(partial(write, scheduler=DYNAMIC_SHIFT), sizes=SIZES, call=sized_call),
    "chroma with beta sigmas": OracleModel(
        partial(write, scheduler={"use_beta_sigmas": True}), sizes=SIZES, call=sized_call
    ),
}
