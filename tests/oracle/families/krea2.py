"""Krea 2 and its distilled model, compared with the stock text-to-image pipeline at strength 1."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from img2img_server.engine.base import EngineJob
from img2img_server.engine.diffusers.families.packing import pack
from tests.engine_bench import text_to_image_call
from tests.oracle.harness import OracleModel
from tests.tiny_flow import SIZES, lively
from tests.tiny_models import perturb_norms, save
from tests.tiny_qwen import TEXT_WIDTH, describing_tokenizer, text_options, video_autoencoder

RUNS = ((1.0, 1), (1.0, 2), (1.0, 5), (1.0, 11), (1.0, 28))


def write(folder: Path, *, is_distilled: bool) -> Path:
    """Writes a model of the Krea 2 kind; returns its folder."""
    torch.manual_seed(10)
    tokenizer = describing_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        axes_dims_rope=(4, 6, 6),
    )
    for name, table in transformer.named_parameters():
        if name.endswith("scale_shift_table"):
            torch.nn.init.normal_(table, std=0.3)
    pipeline = Krea2Pipeline(
        vae=video_autoencoder(),
        text_encoder=_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.4, max_shift=1.2, max_image_seq_len=64
        ),
        text_encoder_select_layers=(1, 2, 3),
        is_distilled=is_distilled,
    )
    return save(pipeline, folder)


def _encoder(tokenizer: Any) -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "deepstack_visual_indexes": [0],
    }
    text = {
        **text_options(tokenizer),
        "head_dim": 8,
        "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"},
    }
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()
    perturb_norms(encoder)
    return encoder


def call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline, which takes packed latents, with a length that
    these prompts fit into.
    """
    arguments = text_to_image_call(wanted, channels=16)
    latents = arguments["latents"]
    arguments["max_sequence_length"] = 64
    return {**arguments, "latents": lambda generator: pack(latents(generator))}


MODELS = {
    "krea 2": OracleModel(
        partial(write, is_distilled=False),
        guidance_scales=(0.0, 1.0, 4.5),
        sizes=SIZES,
        call=call,
        runs=RUNS,
    ),
    "krea 2 distilled": OracleModel(
        partial(write, is_distilled=True),
        guidance_scales=(0.0, 0.5, 2.0),
        sizes=SIZES,
        call=call,
        runs=RUNS,
    ),
}
