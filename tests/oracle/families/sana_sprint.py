"""Sana-Sprint."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from img2img_server.engine.base import EngineJob
from tests.engine_bench import stock_call
from tests.oracle.harness import RUNS, OracleModel
from tests.tiny_flow import lively
from tests.tiny_models import perturb_norms, save

TEXT_WIDTH = 16
_STAGES = 6  # pixels per latent of the autoencoder


def write(folder: Path) -> Path:
    """Writes a model of the Sana-Sprint kind; returns its folder."""
    torch.manual_seed(7)
    instruction = inspect.signature(SanaSprintImg2ImgPipeline.__call__).parameters[
        "complex_human_instruction"
    ]
    tokenizer = gemma_tokenizer(instruction.default)
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )
    pipeline = SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(tokenizer),
        vae=_autoencoder(),
        transformer=lively(transformer),
        scheduler=SCMScheduler(sigma_data=0.5),
    )
    return save(pipeline, folder)


@torch.no_grad()
def _autoencoder() -> Any:
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
        decoder_block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
        encoder_block_out_channels=(8,) * _STAGES,
        decoder_block_out_channels=(8,) * _STAGES,
        encoder_layers_per_block=(1,) * _STAGES,
        decoder_layers_per_block=(1,) * _STAGES,
        encoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
        decoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
        scaling_factor=0.41,
    )
    perturb_norms(vae)
    image = vae.decode(torch.randn(1, 8, 4, 4)).sample
    last = [m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    last.weight *= 0.5 / image.std()
    return vae.eval()


def gemma_encoder(tokenizer: Any) -> Any:
    """Returns a text encoder of two layers."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    encoder = Gemma2Model(config).eval()
    perturb_norms(encoder)
    return encoder


def gemma_tokenizer(texts: Sequence[str]) -> Any:
    """Returns a tokenizer that knows single letters and some whole texts."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *"abcdefghijklmnopqrstuvwxyz", "▁", "\n"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocab, add_bos_token=True)
    tokenizer.add_tokens(list(texts))
    return tokenizer


def call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline for an image of this size."""
    height, width, _ = wanted.init_image.shape
    arguments = {**stock_call(wanted), "height": height, "width": width}
    del arguments["negative_prompt"]
    arguments["use_resolution_binning"] = False
    if wanted.params.num_inference_steps != 2:
        arguments["intermediate_timesteps"] = None
    return arguments


MODELS = {
    "sana-sprint": OracleModel(
        write,
        guidance_scales=(1.0, 4.5, 7.0),
        sizes=((64, 96), (96, 160), (160, 96)),
        call=call,
        # The pipeline has a special angle for two steps.
        runs=(*RUNS, (0.5, 2), (1.0, 2)),
    )
}
