"""Small Stable Diffusion models with random weights, in the directory layout of real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

EPSILON: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
ZERO_SNR_V: dict[str, Any] = {
    **EPSILON,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
}
TURBO: dict[str, Any] = {**EPSILON, "timestep_spacing": "trailing"}
WIDTH, LENGTH = 16, 16
DEEP: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2 + ("CrossAttnUpBlock2D",) * 2,
}


def write_sd(
    folder: Path,
    *,
    tiny_vae: bool = False,
    takes_guidance: bool = False,
    scheduler: dict[str, Any] = EPSILON,
    dtype: torch.dtype = torch.float32,
    is_deep: bool = False,
) -> Path:
    """Writes a model of the SD 1.x kind; returns its folder.

    Args:
        takes_guidance: The guidance scale is an input, as in models distilled for LCM.
        is_deep: The UNet has two blocks of each kind with two layers each.
    """
    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder / "words")
    pipeline = StableDiffusionPipeline(
        vae=sd_autoencoder(tiny_vae),
        text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        unet=lively_unet(
            UNet2DConditionModel(
                **unet_options(cross_attention_dim=WIDTH, **(DEEP if is_deep else {})),
                time_cond_proj_dim=8 if takes_guidance else None,
            )
        ),
        scheduler=DDIMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipeline.to(dtype), folder)


def write_sdxl(folder: Path, *, scheduler: dict[str, Any] = EPSILON, is_deep: bool = False) -> Path:
    """Writes a model of the SDXL kind, with two text encoders and size inputs; returns its
    folder.
    """
    torch.manual_seed(2)
    tokenizer = clip_tokenizer(folder / "words")
    time_width = 8
    unet = UNet2DConditionModel(
        **unet_options(cross_attention_dim=2 * WIDTH, **(DEEP if is_deep else {})),
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=WIDTH + 6 * time_width,
    )
    autoencoder = sd_autoencoder(tiny=False)
    autoencoder.register_to_config(
        latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.2, 0.8, 1.1, 0.9]
    )
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=lively_unet(unet),
        scheduler=DDIMScheduler(**scheduler),
        force_zeros_for_empty_prompt=True,
    )
    return save(pipeline, folder)


def replace_scheduler(folder: Path, scheduler: Any, class_name: str = "") -> Path:
    """Replaces the scheduler and the pipeline class of a written model; returns its folder."""
    scheduler.save_pretrained(folder / "scheduler")
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index["_class_name"] = class_name or index["_class_name"]
    file.write_text(json.dumps(index), encoding="utf-8")
    return folder


def save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def unet_options(**changes: Any) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        **changes,
    }


def sd_autoencoder(tiny: bool) -> Any:
    if tiny:
        return vivid(
            AutoencoderTiny(
                encoder_block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                num_encoder_blocks=(1, 1, 1, 1),
                num_decoder_blocks=(1, 1, 1, 1),
            )
        )
    blocks = 4
    return vivid(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
    )


@torch.no_grad()
def perturb_norms(module: torch.nn.Module) -> None:
    """Moves the weights of norms away from 1 and all biases away from 0."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def lively_unet(unet: Any) -> Any:
    """Strengthens the effect of the text, which is small with random weights, and moves norms away
    from their initial values.
    """
    perturb_norms(unet)
    for name, parameter in unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name or "cond_proj" in name:
            parameter *= 6
    return unet.eval()


@torch.no_grad()
def vivid(autoencoder: Any) -> Any:
    """Increases the contrast of images: random weights give a uniform grey, with which tests would
    prove nothing.
    """
    noise = torch.randn(1, autoencoder.config.latent_channels, 8, 8)
    scale = autoencoder.config.get("scaling_factor", 1.0)
    image = autoencoder.decode(noise / scale).sample
    last = [m for m in autoencoder.decoder.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    last.weight *= 0.5 / image.std()
    return autoencoder.eval()


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a tokenizer that knows single letters only."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.model_max_length = LENGTH
    return tokenizer
