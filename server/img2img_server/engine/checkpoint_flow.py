"""Describes single files of SD3, FLUX.1, Chroma and Z-Image. Imports no torch.

These files hold the transformer, and often the autoencoder and text encoders. Other parts, and
tokenizers, come from the folder of parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, Final

from img2img_server.engine.checkpoint import (
    VAE,
    Checkpoint,
    Hints,
    Shapes,
    autoencoder,
    check_bits,
    count,
)
from img2img_server.engine.checkpoint_text import TEXT_ENCODERS, inside, text_config
from img2img_server.engine.family import ModelError, ModelFiles

_FAMILIES: Final = {
    "FluxPipeline": "flux",
    "ChromaPipeline": "chroma",
    "StableDiffusion3Pipeline": "sd3",
    "ZImagePipeline": "z_image",
}
_PREFIXES: Final = ("model.diffusion_model.", "")
_SCHEDULER: Final = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
_AUTOENCODER: Final = ["diffusers", "AutoencoderKL"]
_CLIP: Final = ["transformers", "CLIPTextModel"]
_CLIP_PROJECTION: Final = ["transformers", "CLIPTextModelWithProjection"]
_CLIP_TOKENIZER: Final = ["transformers", "CLIPTokenizer"]
_T5: Final = ["transformers", "T5EncoderModel"]
_T5_TOKENIZER: Final = ["transformers", "T5TokenizerFast"]
_FLOW: Final[Mapping[str, Any]] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
}
_SD3_HEAD: Final = 64
_Z_IMAGE_HEAD: Final = 128


def describe_flow(shapes: Shapes, hints: Hints, place: str) -> Checkpoint | None:
    """Returns the contents of a single file; None if its transformer is of no family here.

    Raises:
        ModelError: The file holds text encoders in another layout than that of ComfyUI.
    """
    check_bits(shapes, place)
    for prefix in _PREFIXES:
        own = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }
        found = _transformer(own)
        if found is None:
            continue
        index, configs, factors = found
        if index["_class_name"] == "FluxPipeline" and hints.says(r"\w*kontext\w*"):
            raise ModelError(
                f"{place} is FLUX.1 Kontext by its name, which edits images by instructions and is "
                "not served: use FLUX.1 dev or schnell"
            )
        if texts := [name for name in shapes if name.startswith("cond_stage_model.")]:
            raise ModelError(
                f"{place} holds text encoders in a layout that is not read ({texts[0]}): use a "
                "file without them, and IMG2IMG_MODEL_PARTS_DIR"
            )
        prefixes = {"transformer": prefix}
        family = _FAMILIES[index["_class_name"]]
        for part in TEXT_ENCODERS[family]:
            start = inside(family, part)
            if config := text_config(index[part][1], shapes, start):
                configs[part], prefixes[part] = config, start
        for start in (VAE, "vae."):
            if f"{start}decoder.conv_in.weight" in shapes:
                configs["vae"] = autoencoder(shapes, start, *factors)
                prefixes["vae"] = start
        return Checkpoint(ModelFiles(index, configs, hints.names), prefixes)
    return None


_Found = tuple[dict[str, Any], dict[str, Mapping[str, Any]], tuple[float, float]]


def _transformer(own: Shapes) -> _Found | None:
    if "distilled_guidance_layer.in_proj.bias" in own:
        return _chroma(own)
    if "double_blocks.0.img_attn.norm.key_norm.scale" in own and "vector_in.in_layer.weight" in own:
        return _flux(own)
    if "joint_blocks.0.context_block.adaLN_modulation.1.bias" in own:
        return _sd3(own)
    if "cap_pad_token" in own and "layers.0.adaLN_modulation.0.weight" in own:
        return _z_image(own)
    return None


def _packed(own: Shapes) -> dict[str, Any]:
    """Returns the common part of the configurations of FLUX.1 and Chroma."""
    taken, given = own["img_in.weight"][1], own["final_layer.linear.weight"][0]
    head = own["double_blocks.0.img_attn.norm.key_norm.scale"][0]
    return {
        "patch_size": 1,
        "in_channels": taken,
        "out_channels": given if given != taken else None,
        "num_layers": count(own, "double_blocks."),
        "num_single_layers": count(own, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": own["img_in.weight"][0] // head,
        "joint_attention_dim": own["txt_in.weight"][1],
        "axes_dims_rope": [16, 56, 56],
    }


def _flux(own: Shapes) -> _Found:
    takes_guidance = "guidance_in.in_layer.weight" in own
    transformer = {
        **_packed(own),
        "_class_name": "FluxTransformer2DModel",
        "pooled_projection_dim": own["vector_in.in_layer.weight"][1],
        "guidance_embeds": takes_guidance,
    }
    # Models without guidance were distilled from schnell, whose schedule is not shifted.
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if takes_guidance else {"shift": 1.0}
    scheduler = {
        **_FLOW,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        **shift,
    }
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": _AUTOENCODER,
        "scheduler": _SCHEDULER,
        "text_encoder": _CLIP,
        "tokenizer": _CLIP_TOKENIZER,
        "text_encoder_2": _T5,
        "tokenizer_2": _T5_TOKENIZER,
    }
    return index, {"transformer": transformer, "scheduler": scheduler}, (0.3611, 0.1159)


def _chroma(own: Shapes) -> _Found:
    width, taken = own["distilled_guidance_layer.in_proj.weight"]
    transformer = {
        **_packed(own),
        "_class_name": "ChromaTransformer2DModel",
        "approximator_num_channels": taken,
        "approximator_hidden_dim": width,
        "approximator_layers": count(own, "distilled_guidance_layer.layers."),
    }
    index = {
        "_class_name": "ChromaPipeline",
        "transformer": ["diffusers", "ChromaTransformer2DModel"],
        "vae": _AUTOENCODER,
        "scheduler": _SCHEDULER,
        "text_encoder": _T5,
        "tokenizer": _T5_TOKENIZER,
    }
    return index, {"transformer": transformer}, (0.3611, 0.1159)


def _sd3(own: Shapes) -> _Found:
    layers = count(own, "joint_blocks.")
    width, taken, patch, _ = own["x_embedder.proj.weight"]
    transformer = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": taken,
        "out_channels": own["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": _SD3_HEAD,
        "num_attention_heads": width // _SD3_HEAD,
        "joint_attention_dim": own["context_embedder.weight"][1],
        "caption_projection_dim": own["context_embedder.weight"][0],
        "pooled_projection_dim": own["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": isqrt(own["pos_embed"][1]),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in own else None,
        "dual_attention_layers": [
            layer
            for layer in range(layers)
            if f"joint_blocks.{layer}.x_block.attn2.qkv.weight" in own
        ],
    }
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": _AUTOENCODER,
        "scheduler": _SCHEDULER,
        "text_encoder": _CLIP_PROJECTION,
        "tokenizer": _CLIP_TOKENIZER,
        "text_encoder_2": _CLIP_PROJECTION,
        "tokenizer_2": _CLIP_TOKENIZER,
        "text_encoder_3": _T5,
        "tokenizer_3": _T5_TOKENIZER,
    }
    scheduler = {**_FLOW, "shift": 3.0}
    return index, {"transformer": transformer, "scheduler": scheduler}, (1.5305, 0.0609)


def _z_image(own: Shapes) -> _Found:
    width, taken = own["x_embedder.weight"]
    transformer = {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": taken // 4,
        "dim": width,
        "n_layers": count(own, "layers."),
        "n_refiner_layers": count(own, "noise_refiner."),
        "n_heads": width // _Z_IMAGE_HEAD,
        "n_kv_heads": width // _Z_IMAGE_HEAD,
        "cap_feat_dim": own["cap_embedder.1.weight"][1],
        "qk_norm": "layers.0.attention.q_norm.weight" in own,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }
    index = {
        "_class_name": "ZImagePipeline",
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": _AUTOENCODER,
        "scheduler": _SCHEDULER,
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    }
    return index, {"transformer": transformer}, (0.3611, 0.1159)
