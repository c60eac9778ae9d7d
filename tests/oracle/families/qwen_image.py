"""Qwen-Image and a Lightning model, which differ in their schedules."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from img2img_server.engine.base import EngineJob
from tests.engine_bench import stock_call
from tests.oracle.harness import RUNS, OracleModel
from tests.tiny_flow import SIZES, lively
from tests.tiny_models import perturb_norms, save
from tests.tiny_qwen import TEXT_WIDTH, describing_tokenizer, text_options, video_autoencoder

SHIFT: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
LIGHTNING: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": math.log(3),
    "max_shift": math.log(3),
}


def write(folder: Path, *, scheduler: dict[str, Any]) -> Path:
    """Writes a model of the Qwen-Image kind; returns its folder."""
    torch.manual_seed(6)
    tokenizer = describing_tokenizer()
    pipeline = QwenImagePipeline(
        vae=video_autoencoder(),
        text_encoder=_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=lively(
            QwenImageTransformer2DModel(
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_WIDTH,
                axes_dims_rope=(4, 6, 6),
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
    )
    return save(pipeline, folder)


def _encoder(tokenizer: Any) -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
    }
    text = {
        **text_options(tokenizer),
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0], "rope_type": "default"},
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    perturb_norms(encoder)
    return encoder


def call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline, which has another name for the guidance
    scale.
    """
    height, width, _ = wanted.init_image.shape
    arguments = {**stock_call(wanted), "height": height, "width": width}
    arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
    # The authors recommend a space for an empty negative prompt.
    arguments["negative_prompt"] = wanted.params.negative_prompt or " "
    return arguments


MODELS = {
    "qwen-image": OracleModel(
        partial(write, scheduler=SHIFT),
        guidance_scales=(1.0, 2.0, 4.0),
        sizes=SIZES,
        call=call,
        # A schedule of one step cannot be stretched to a terminal value: the stock pipeline divides
        # by zero.
        runs=tuple(run for run in RUNS if run[1] > 1),
    ),
    "qwen-image lightning": OracleModel(
        partial(write, scheduler=LIGHTNING),
        guidance_scales=(1.0, 1.5, 3.0),
        sizes=SIZES,
        call=call,
    ),
}
