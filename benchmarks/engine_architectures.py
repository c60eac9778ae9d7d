"""Pipelines with random weights and the shapes of real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from benchmarks.engine_load import UNET, Traits
from img2img_server.domain.models import Guidance
from img2img_server.domain.strength import StrengthRule

LENGTH = 77
_FLOW = {"scheduler": "flow_match_euler", "strength_rule": StrengthRule.CEIL}
FLOW_ARCHITECTURES = {
    "flux-schnell": Traits(**_FLOW, guidance=Guidance.NONE, guidance_scales=(1.0, 1.0)),
    "sd35-medium": Traits(**_FLOW),
    "z-image-turbo": Traits(
        **_FLOW, guidance=Guidance.CLASSIFIER_FREE_FROM_ZERO, guidance_scales=(0.0, 4.0)
    ),
}
_SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**_SD_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-turbo": {
        **_SD_BLOCKS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl-turbo": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # A third of the channels of SD 1.5, for measurements of its UNet on a CPU.
    "sd15-small": {
        **_SD_BLOCKS,
        "block_out_channels": (96, 160, 320, 320),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    # This is no real architecture. It tests the benchmark itself in seconds.
    "toy": {
        **_SD_BLOCKS,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
}
# width, layers and heads of the text encoders
_CLIP_L, _OPEN_CLIP_H, _OPEN_CLIP_G = (768, 12, 12), (1024, 23, 16), (1280, 32, 20)
_TEXT = {"sd15": _CLIP_L, "sd-turbo": _OPEN_CLIP_H, "toy": (768, 1, 12)}
_TEXT["sd15-small"] = _TEXT["toy"]
_VAE_CHANNELS = (128, 256, 512, 512)


def traits_of(name: str) -> Traits:
    """Returns the traits of requests to an architecture; those of a UNet for a folder."""
    return FLOW_ARCHITECTURES.get(name.removeprefix("toy-"), UNET)


def build(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns an image-to-image pipeline on the device. `folder`: for the tokenizer's files."""
    return ARCHITECTURES[name](name, folder, device, dtype)


def _transformer(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from benchmarks.engine_transformers import build_transformer

    return build_transformer(name, folder, device, dtype)


def _sd(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    channels = (32,) * 4 if name in ("toy", "sd15-small") else _VAE_CHANNELS
    with device:
        parts = [_unet(name), _autoencoder(0.18215, channels), CLIPTextModel(_text(_TEXT[name]))]
    unet, vae, text = (_placed(part, dtype) for part in parts)
    return StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=clip_tokenizer(folder),
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    with device:
        parts = [
            _unet(name),
            _autoencoder(0.13025),
            CLIPTextModel(_text(_CLIP_L)),
            CLIPTextModelWithProjection(_text(_OPEN_CLIP_G)),
        ]
    unet, vae, text, text_2 = (_placed(part, dtype) for part in parts)
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )


ARCHITECTURES: dict[str, Callable[[str, Path, torch.device, torch.dtype], Any]] = {
    "sd15": _sd,
    "sd-turbo": _sd,
    "sdxl-turbo": _sdxl,
    "toy": _sd,
    "sd15-small": _sd,
    **dict.fromkeys(
        (toy + name for toy in ("", "toy-") for name in FLOW_ARCHITECTURES), _transformer
    ),
}


def _placed(part: Any, dtype: torch.dtype) -> Any:
    part = part.to(dtype).eval()
    is_convolutional = isinstance(part, UNet2DConditionModel | AutoencoderKL)
    return part.to(memory_format=torch.channels_last) if is_convolutional else part


def _unet(name: str) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{"sample_size": 64, **_UNETS[name]})


def _autoencoder(scaling_factor: float, channels: tuple[int, ...] = _VAE_CHANNELS) -> AutoencoderKL:
    blocks = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def _text(shape: tuple[int, int, int]) -> CLIPTextConfig:
    width, layers, heads = shape
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=LENGTH,
    )


def _scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a tokenizer of single letters: the content of a prompt does not affect the speed."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    end = "<|endoftext|>"
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token="<|startoftext|>",
        eos_token=end,
        unk_token=end,
        pad_token=end,
    )
    tokenizer.model_max_length = LENGTH
    return tokenizer
