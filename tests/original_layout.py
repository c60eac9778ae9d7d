"""Writes small models as single files, with the names of tensors of the original code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from img2img_server.engine.diffusers.clip_tokenizer import clip_tokenizer
from tests.tiny_models import EPSILON, lively_unet, vivid

TOKENS = 49408
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def replaced(name: str, names: Mapping[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(new, old)
    return name


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    """Returns the tensors of a UNet in the layout of the original code."""
    layers = unet.config.layers_per_block
    found = {}
    for name, tensor in unet.state_dict().items():
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
        if name.startswith("mid_block."):
            place, rest = re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
            number = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[place]
            is_resnet = place.startswith("resnets")
            old = f"middle_block.{number}.{replaced(rest, _RESNET) if is_resnet else rest}"
        elif match is None:
            old = replaced(name, _UNET)
        else:
            side, level, kind, item = match[1], int(match[2]), match[3], int(match[4])
            rest = replaced(match[5], _RESNET) if kind == "resnets" else match[5]
            if side == "down" and kind == "downsamplers":
                old = f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
            elif side == "down":
                block = (layers + 1) * level + item + 1
                old = f"input_blocks.{block}.{0 if kind == 'resnets' else 1}.{rest}"
            elif kind == "upsamplers":
                has_attention = "CrossAttn" in unet.config.up_block_types[level]
                block = (layers + 1) * level + layers
                old = f"output_blocks.{block}.{2 if has_attention else 1}.{rest}"
            else:
                block = (layers + 1) * level + item
                old = f"output_blocks.{block}.{0 if kind == 'resnets' else 1}.{rest}"
        found[f"model.diffusion_model.{old}"] = tensor
    return found


def autoencoder_tensors(vae: Any, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """Returns the tensors of an autoencoder in the layout of the original code."""
    levels = len(vae.config.block_out_channels)
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    found = {}
    for name, tensor in vae.state_dict().items():
        old = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        old = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", old)
        old = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", old)
        for number in range(levels):
            old = re.sub(
                rf"up_blocks\.{number}\.resnets\.(\d+)", rf"up.{levels - 1 - number}.block.\1", old
            )
            old = old.replace(
                f"up_blocks.{number}.upsamplers.0", f"up.{levels - 1 - number}.upsample"
            )
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda it: f"mid.block_{int(it[1]) + 1}", old)
        if "mid_block.attentions.0" in old:
            old = replaced(old.replace("mid_block.attentions.0", "mid.attn_1"), attention)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        found[prefix + old] = tensor
    return found


def clip_tensors(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """Returns the tensors of a CLIP encoder in the layout of transformers, as files have them."""
    found = {}
    for name, tensor in encoder.state_dict().items():
        is_whole = name.startswith(("text_model.", "text_projection"))
        found[prefix + (name if is_whole else f"text_model.{name}")] = tensor
    return found


def open_clip_tensors(encoder: Any, prefix: str, *, unused_layers: int = 0) -> dict[str, Tensor]:
    """Returns the tensors of a CLIP encoder in the layout of OpenCLIP."""
    state = {name.removeprefix("text_model."): it for name, it in encoder.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif match := re.fullmatch(
            r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name
        ):
            parts = [state[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            old = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
            found[old] = torch.cat(parts)
        elif not re.search(r"[kv]_proj", name):
            found[replaced(name, _OPEN_CLIP)] = tensor
    layers = encoder.config.num_hidden_layers
    for extra in range(unused_layers):
        start = "transformer.resblocks.0."
        for name in [key for key in found if key.startswith(start)]:
            new = name.replace(start, f"transformer.resblocks.{layers + extra}.")
            found[new] = torch.randn_like(found[name])
    found["logit_scale"] = torch.ones(())
    return {prefix + name: it for name, it in found.items()}


def clip_config(width: int, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": TOKENS,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": width,
            "num_hidden_layers": 2,
            "num_attention_heads": width // 64,
            "max_position_embeddings": 77,
            "bos_token_id": TOKENS - 2,
            "eos_token_id": TOKENS - 1,
            "pad_token_id": 1,
            **changes,
        }
    )


def unet_model(heads: Any, text_width: int, **changes: Any) -> Any:
    return lively_unet(
        UNet2DConditionModel(
            **{
                "sample_size": 64,
                "block_out_channels": (64, 128),
                "layers_per_block": 1,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "cross_attention_dim": text_width,
                "attention_head_dim": heads,
                **changes,
            }
        )
    )


def autoencoder_model(scaling_factor: float, **changes: Any) -> Any:
    blocks = 4
    return vivid(
        AutoencoderKL(
            **{
                "down_block_types": ("DownEncoderBlock2D",) * blocks,
                "up_block_types": ("UpDecoderBlock2D",) * blocks,
                "block_out_channels": (32,) * blocks,
                "layers_per_block": 1,
                "latent_channels": 4,
                "scaling_factor": scaling_factor,
                **changes,
            }
        )
    )


TRAINING = {
    "model_ema.decay": torch.ones(()),
    "betas": torch.ones(1000),
    "alphas_cumprod": torch.ones(1000),
    "sqrt_alphas_cumprod": torch.ones(1000),
    "scale_factor": torch.ones(()),
}


def write_sd1(folder: Path) -> tuple[Any, Path]:
    """Writes a model of the SD 1.x kind; returns its pipeline and its single file."""
    torch.manual_seed(11)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder_model(0.18215),
        text_encoder=CLIPTextModel(clip_config(64, hidden_act="quick_gelu")).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet_model(8, 64),
        scheduler=PNDMScheduler(
            **without(EPSILON, "clip_sample", "timestep_spacing"), skip_prk_steps=True
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    text = "cond_stage_model.transformer."
    tensors = {
        **unet_tensors(pipeline.unet),
        **autoencoder_tensors(pipeline.vae),
        **clip_tensors(pipeline.text_encoder, text),
        f"{text}text_model.embeddings.position_ids": torch.arange(77)[None],
        **TRAINING,
    }
    return pipeline, write(folder / "dreamy_v8.safetensors", tensors)


def write_sd2(folder: Path) -> tuple[Any, Path]:
    """Writes a model of the SD 2.x kind that predicts v; returns its pipeline and its file."""
    torch.manual_seed(12)
    encoder = CLIPTextModel(clip_config(128, hidden_act="gelu")).eval()
    changes = {"use_linear_projection": True, "sample_size": 96, "upcast_attention": True}
    unet = unet_model((1, 2), 128, **changes)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder_model(0.18215),
        text_encoder=encoder,
        tokenizer=clip_tokenizer("!"),
        unet=unet,
        scheduler=DDIMScheduler(**{**EPSILON, "prediction_type": "v_prediction"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    tensors = {
        **unet_tensors(unet),
        **autoencoder_tensors(pipeline.vae),
        **open_clip_tensors(encoder, "cond_stage_model.model.", unused_layers=1),
        "cond_stage_model.model.text_projection": torch.randn(128, 128),
        **TRAINING,
    }
    return pipeline, write(folder / "v2-1_768-ema-pruned.safetensors", tensors)


def write_sdxl(folder: Path) -> tuple[Any, Path]:
    """Writes a model of the SDXL kind; returns its pipeline and its single file."""
    torch.manual_seed(13)
    first = CLIPTextModel(clip_config(64, hidden_act="quick_gelu")).eval()
    second = CLIPTextModelWithProjection(clip_config(128, hidden_act="gelu")).eval()
    unet = unet_model(
        (1, 2, 4),
        192,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=128 + 6 * 256,
        sample_size=128,
    )
    scheduler = without(EPSILON, "clip_sample", "set_alpha_to_one")
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder_model(0.13025),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**scheduler),
        force_zeros_for_empty_prompt=True,
    )
    tensors = {
        **unet_tensors(unet),
        **autoencoder_tensors(pipeline.vae),
        **clip_tensors(first, "conditioner.embedders.0.transformer."),
        **open_clip_tensors(second, "conditioner.embedders.1.model."),
        "denoiser.sigmas": torch.ones(1000),
    }
    return pipeline, write(folder / "pony.safetensors", tensors)


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: it for key, it in values.items() if key not in keys}


def write(file: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: it.contiguous().clone() for name, it in tensors.items()}, file)
    return file
