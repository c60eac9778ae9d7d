"""Pipelines of flow-matching transformers with random weights and the shapes of real models.

The numbers are those of the published configurations. A "toy" has the same parts, but few small
ones: it tests the benchmark itself in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.engine_architectures import clip_tokenizer

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "flux-schnell": {"guidance_embeds": False},
    "sd35-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "z-image-turbo": {"axes_lens": [1536, 512, 512]},
    "toy-flux-schnell": {
        "guidance_embeds": False,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "axes_dims_rope": (2, 2, 4),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
    "toy-sd35-medium": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "toy-z-image-turbo": {
        "axes_lens": [1024, 64, 64],
        "axes_dims": [8, 8, 8],
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
    },
}
# Width, layers, heads of the text encoders.
_CLIP_L, _CLIP_G, _T5, _QWEN3 = (768, 12, 12), (1280, 32, 20), (4096, 24, 64), (2560, 36, 32)
_TOY, _TOY_T5 = (32, 1, 2), {"flux": (32, 1, 2), "sd35": (64, 1, 2)}
_QWEN3_WORDS, _T5_WORDS, _CLIP_WORDS = 151_936, 32_128, 49_408


def build_transformer(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns an image-to-image pipeline on the device. `folder`: for a tokenizer's files."""
    is_toy = name.startswith("toy-")
    with device, _default_dtype(dtype):  # float32 would need twice the memory for a moment
        parts = _BUILDERS[name.removeprefix("toy-")](name, folder, is_toy)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype).eval()
    return parts.pop("class")(**parts)


def network(name: str) -> Any:
    """Returns the denoiser, on the default device."""
    options = TRANSFORMERS[name]
    if "flux" in name:
        return FluxTransformer2DModel(**options)
    if "sd35" in name:
        return SD3Transformer2DModel(**options)
    found = ZImageTransformer2DModel(**options)
    for token in (found.x_pad_token, found.cap_pad_token):
        torch.nn.init.normal_(token)  # diffusers does not initialise these weights.
    return found


def _flux(name: str, folder: Path, is_toy: bool) -> dict[str, Any]:
    return {
        "class": FluxImg2ImgPipeline,
        "vae": _autoencoder(0.3611, 0.1159, is_toy),
        "text_encoder": CLIPTextModel(_clip(_TOY if is_toy else _CLIP_L)),
        "text_encoder_2": _t5(_TOY_T5["flux"] if is_toy else _T5),
        "tokenizer": clip_tokenizer(folder),
        "tokenizer_2": _t5_tokenizer(512),
        "transformer": network(name),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
    }


def _sd3(name: str, folder: Path, is_toy: bool) -> dict[str, Any]:
    tokenizer = clip_tokenizer(folder)
    return {
        "class": StableDiffusion3Img2ImgPipeline,
        "vae": _autoencoder(1.5305, 0.0609, is_toy),
        "text_encoder": CLIPTextModelWithProjection(_clip(_TOY if is_toy else _CLIP_L)),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(_TOY if is_toy else _CLIP_G)),
        "text_encoder_3": _t5(_TOY_T5["sd35"] if is_toy else _T5),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": _t5_tokenizer(256),
        "transformer": network(name),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _z_image(name: str, folder: Path, is_toy: bool) -> dict[str, Any]:
    width, layers, heads = (32, 2, 2) if is_toy else _QWEN3
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=_QWEN3_WORDS // (100 if is_toy else 1),
            hidden_size=width,
            intermediate_size=64 if is_toy else 9728,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=16 if is_toy else 128,
        )
    )
    return {
        "class": ZImageImg2ImgPipeline,
        "vae": _autoencoder(0.3611, 0.1159, is_toy),
        "text_encoder": encoder,
        "tokenizer": _qwen_tokenizer(),
        "transformer": network(name),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


_BUILDERS: dict[str, Callable[[str, Path, bool], dict[str, Any]]] = {
    "flux-schnell": _flux,
    "sd35-medium": _sd3,
    "z-image-turbo": _z_image,
}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _autoencoder(scaling_factor: float, shift_factor: float, is_toy: bool) -> AutoencoderKL:
    blocks = 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(32,) * blocks if is_toy else (128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(shape: tuple[int, int, int]) -> CLIPTextConfig:
    width, layers, heads = shape
    return CLIPTextConfig(
        vocab_size=_CLIP_WORDS,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _t5(shape: tuple[int, int, int]) -> T5EncoderModel:
    width, layers, heads = shape
    return T5EncoderModel(
        T5Config(
            vocab_size=_T5_WORDS,
            d_model=width,
            d_kv=64,
            d_ff=width * 5 // 2,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
        )
    )


def _t5_tokenizer(length: int) -> T5Tokenizer:
    """Returns a tokenizer of single letters: the words of a prompt do not matter for speed."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Returns a tokenizer of single bytes with the template of chats."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    return tokenizer
