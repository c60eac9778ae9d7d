"""Kolors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from sentencepiece import SentencePieceTrainer

from img2img_server.engine.base import EngineJob
from tests.engine_bench import stock_call
from tests.oracle.harness import OracleModel
from tests.tiny_models import DEEP, WIDTH, lively_unet, save, sd_autoencoder, unet_options

_TIME_WIDTH = 8
# The schedule of the published model, which has more noise at the end than SDXL's.
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1100,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def write(folder: Path) -> Path:
    """Writes a model of the Kolors kind; returns its folder."""
    torch.manual_seed(8)
    unet = UNet2DConditionModel(
        **unet_options(cross_attention_dim=2 * WIDTH, **DEEP),
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_WIDTH,
        projection_class_embeddings_input_dim=WIDTH + 6 * _TIME_WIDTH,
    )
    pipeline = KolorsPipeline(
        vae=sd_autoencoder(tiny=False),
        text_encoder=_encoder(),
        tokenizer=_tokenizer(folder / "words"),
        unet=lively_unet(unet),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
    )
    return save(pipeline, folder)


@torch.no_grad()
def _encoder() -> Any:
    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=64,
        hidden_size=WIDTH,
        ffn_hidden_size=2 * WIDTH,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=512,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        original_rope=True,
    )
    encoder = ChatGLMModel(config, empty_init=False).eval()
    # The class does not initialize its weights.
    for parameter in encoder.parameters():
        parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return encoder


def _tokenizer(folder: Path) -> Any:
    """Returns a tokenizer that knows single letters only."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abcdefghijklmnopqrstuvwxyz a b"] * 20),
        model_writer=model,
        model_type="char",
        vocab_size=31,
        pad_id=3,
        minloglevel=2,
    )
    file = folder / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(file))


def call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline, whose default size differs from the init
    image's.
    """
    height, width, _ = wanted.init_image.shape
    return {**stock_call(wanted), "height": height, "width": width}


MODELS = {
    # Only the text encoder differs from SDXL, which is compared with every scheduler.
    "kolors": OracleModel(write, call=call, schedulers=("euler", "dpmpp_2m")),
}
