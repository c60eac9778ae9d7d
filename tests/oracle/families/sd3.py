"""Stable Diffusion 3 and 3.5, with and without T5."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from img2img_server.engine.base import EngineJob
from tests.oracle.harness import OracleModel
from tests.tiny_flow import (
    DYNAMIC_SHIFT,
    SIZES,
    autoencoder,
    lively,
    sized_call,
    t5_encoder,
    t5_tokenizer,
)
from tests.tiny_models import WIDTH, clip_tokenizer, save, text_config

# the width of both CLIP encoders together, which is T5's width in models with T5
JOINT_WIDTH = 2 * WIDTH


def write(folder: Path, *, scheduler: dict[str, Any], has_t5: bool = True, **changes: Any) -> Path:
    """Writes a model of the Stable Diffusion 3 kind; returns its folder.

    Args:
        changes: Further options of the transformer.
    """
    torch.manual_seed(4)
    tokenizer, t5 = clip_tokenizer(folder / "words"), t5_tokenizer()
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer)).eval() for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        **changes,
    )
    pipeline = StableDiffusion3Pipeline(
        vae=autoencoder(),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=t5_encoder(t5, JOINT_WIDTH) if has_t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5 if has_t5 else None,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    )
    return save(pipeline, folder)


def call_without_t5(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline, which uses 256 zeros instead of T5's
    encoding.
    """
    return {**sized_call(wanted), "max_sequence_length": 256}


SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}

MODELS = {
    "sd3.5": OracleModel(
        partial(write, scheduler={"shift": 3.0}, **SD35), sizes=SIZES, call=sized_call
    ),
    "sd3 without t5": OracleModel(
        partial(write, scheduler={"shift": 3.0}, has_t5=False), sizes=SIZES, call=call_without_t5
    ),
    "sd3.5 shifted by the size": OracleModel(
        partial(write, scheduler=DYNAMIC_SHIFT, **SD35), sizes=SIZES, call=sized_call
    ),
}
