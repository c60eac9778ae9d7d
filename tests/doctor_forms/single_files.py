"""Single files that are damaged, of another kind, or no model at all."""

from __future__ import annotations

import os
from typing import Any

import torch

from tests import original_layout
from tests.doctor_forms.forms import (
    AGAIN,
    PAGE,
    POINTER,
    SERVE,
    UNET,
    Builder,
    Settings,
    advice,
    broken,
    cut,
    lora,
)
from tests.doctor_forms.wrong_models import OTHER

INPUT = "model.diffusion_model.input_blocks.0.0.weight"


@broken("dreamy.safetensors", "cut|incomplete|truncat|shorter|damaged", advice=AGAIN)
def cut_checkpoint(builder: Builder) -> Settings:
    file = builder.single("dreamy.safetensors")
    cut(file)
    return {"MODEL": file}


@broken("dreamy.safetensors", "lfs", advice=AGAIN)
def lfs_pointer_of_a_checkpoint(builder: Builder) -> Settings:
    return {"MODEL": builder.bytes("dreamy.safetensors", POINTER)}


@broken("dreamy.safetensors", "html|web page", advice=AGAIN)
def sign_in_page_instead_of_a_checkpoint(builder: Builder) -> Settings:
    return {"MODEL": builder.bytes("dreamy.safetensors", PAGE)}


@broken("dreamy.safetensors", "no tensors|empty|no model", advice=AGAIN + "|" + OTHER)
def checkpoint_without_tensors(builder: Builder) -> Settings:
    return {"MODEL": builder.tensors("dreamy.safetensors", {}, format="pt")}


@broken("dreamy.safetensors", "pickle|ckpt|PyTorch", advice=OTHER + "|" + advice("rename"))
def pickle_under_the_name_of_safetensors(builder: Builder) -> Settings:
    torch.save({"state_dict": dict(builder.stock.single)}, builder.folder / "dreamy.safetensors")
    return {"MODEL": builder.folder / "dreamy.safetensors"}


@broken("dreamy.ckpt", "IMG2IMG_ALLOW_PICKLES", advice=SERVE)
def pickle_that_is_not_allowed(builder: Builder) -> Settings:
    torch.save({"state_dict": dict(builder.stock.single)}, builder.folder / "dreamy.ckpt")
    return {"MODEL": builder.folder / "dreamy.ckpt"}


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["IMG2IMG_TEST_TRACE"],)


@broken("dreamy.ckpt", "code|not only|other than|unsafe|weights", advice=OTHER)
def pickle_with_code(builder: Builder) -> Settings:
    os.environ["IMG2IMG_TEST_TRACE"] = str(builder.folder / "code-ran")
    try:
        torch.save({"state_dict": {}, "extra": _Code()}, builder.folder / "dreamy.ckpt")
    finally:
        del os.environ["IMG2IMG_TEST_TRACE"]
    return {"MODEL": builder.folder / "dreamy.ckpt", "ALLOW_PICKLES": "true"}


@broken("style.safetensors", "LoRA", "IMG2IMG_LORA_DIR", advice=SERVE)
def lora_as_a_model(builder: Builder) -> Settings:
    return {"MODEL": builder.tensors("style.safetensors", lora(16))}


@broken("vae-ft-mse.safetensors", "autoencoder|VAE", "IMG2IMG_VAE_DIR", advice=SERVE)
def autoencoder_as_a_model(builder: Builder) -> Settings:
    start = "first_stage_model."
    file = builder.single(
        "vae-ft-mse.safetensors",
        lambda key: key.removeprefix(start) if key.startswith(start) else None,
    )
    return {"MODEL": file}


@broken("badhands.safetensors", "embedding|textual", "IMG2IMG_EMBEDDINGS_DIR", advice=SERVE)
def embedding_as_a_model(builder: Builder) -> Settings:
    return {"MODEL": builder.tensors("badhands.safetensors", {"emb_params": (4, 768)})}


@broken("flux1-dev-Q4_K_S.gguf", "IMG2IMG_GGUF_FILE", advice=SERVE)
def gguf_as_a_model(builder: Builder) -> Settings:
    content = b"GGUF" + (3).to_bytes(4, "little") + bytes(512)
    return {"MODEL": builder.bytes("flux1-dev-Q4_K_S.gguf", content)}


@broken("model.onnx", "ONNX", advice=OTHER)
def onnx_as_a_model(builder: Builder) -> Settings:
    return {"MODEL": builder.bytes("model.onnx", b"\x08\x07\x12\x07pytorch" + bytes(100))}


@broken("dreamy.safetensors", "EMA", advice=OTHER)
def only_ema_weights(builder: Builder) -> Settings:
    unet = "model.diffusion_model."

    def averaged(key: str) -> str:
        if not key.startswith(unet):
            return key
        return "model_ema." + key.removeprefix("model.").replace(".", "")

    return {"MODEL": builder.single("dreamy.safetensors", averaged)}


@broken("dreamy-inpainting.safetensors", "inpaint|9|nine", advice=OTHER)
def checkpoint_for_inpainting(builder: Builder) -> Settings:
    weight = builder.stock.single[INPUT]
    tensors = {**builder.stock.single, INPUT: weight.repeat(1, 3, 1, 1)[:, :9].contiguous()}
    return {"MODEL": builder.tensors("dreamy-inpainting.safetensors", tensors)}


@broken("refiner.safetensors", "refiner", advice=OTHER)
def checkpoint_of_the_refiner(builder: Builder) -> Settings:
    encoder = original_layout.clip_config(128, hidden_act="gelu")
    from transformers import CLIPTextModelWithProjection

    unet = original_layout.unet_model(
        (1, 2),
        128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=128 + 5 * 256,
    )
    vae = original_layout.autoencoder_model(0.13025)
    tensors = {
        **original_layout.unet_tensors(unet),
        **original_layout.autoencoder_tensors(vae),
        **original_layout.open_clip_tensors(
            CLIPTextModelWithProjection(encoder), "conditioner.embedders.0.model."
        ),
    }
    return {"MODEL": original_layout.write(builder.folder / "refiner.safetensors", tensors)}


@broken("unet-only.safetensors", "text_encoder", "IMG2IMG_MODEL_PARTS_DIR", advice=SERVE)
def checkpoint_without_text_encoder(builder: Builder) -> Settings:
    file = builder.single(
        "unet-only.safetensors",
        lambda key: None if key.startswith("cond_stage_model.") else key,
    )
    return {"MODEL": file}


@broken("diffusion_pytorch_model.safetensors", "UNet|part", advice=SERVE)
def weights_of_a_part_as_a_model(builder: Builder) -> Settings:
    return {"MODEL": builder.sd() / UNET}


@broken("4x-sharp.safetensors", "upscal|no family|not a|unknown|known", advice=OTHER)
def upscaler_as_a_model(builder: Builder) -> Settings:
    shapes = {
        "model.0.weight": (64, 3, 3, 3),
        "model.0.bias": (64,),
        "model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3),
    }
    return {"MODEL": builder.tensors("4x-sharp.safetensors", shapes)}


@broken("ip-adapter_sd15.safetensors", "IP-Adapter", advice=OTHER)
def ip_adapter_as_a_model(builder: Builder) -> Settings:
    shapes = {
        "image_proj.proj.weight": (3072, 16),
        "image_proj.norm.weight": (768,),
        "ip_adapter.1.to_k_ip.weight": (320, 768),
    }
    return {"MODEL": builder.tensors("ip-adapter_sd15.safetensors", shapes)}


@broken("control_canny.safetensors", "ControlNet", advice=OTHER)
def controlnet_as_a_model(builder: Builder) -> Settings:
    shapes = {
        "control_model.input_blocks.0.0.weight": (64, 4, 3, 3),
        "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
        "control_model.zero_convs.0.0.weight": (64, 64, 1, 1),
    }
    return {"MODEL": builder.tensors("control_canny.safetensors", shapes)}


@broken("qwen.safetensors", "language model|no family|not a|unknown|known", advice=OTHER)
def language_model_as_a_model(builder: Builder) -> Settings:
    shapes = {
        "model.embed_tokens.weight": (64, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "lm_head.weight": (64, 32),
    }
    return {"MODEL": builder.tensors("qwen.safetensors", shapes)}


@broken("wan2.1_t2v.safetensors", "video|no family|not a|unknown|known", advice=OTHER)
def video_model_as_a_model(builder: Builder) -> Settings:
    shapes = {
        "model.diffusion_model.patch_embedding.weight": (64, 16, 1, 2, 2),
        "model.diffusion_model.blocks.0.cross_attn.k.weight": (64, 64),
        "model.diffusion_model.head.head.weight": (64, 64),
    }
    return {"MODEL": builder.tensors("wan2.1_t2v.safetensors", shapes)}


@broken("motion.safetensors", "AnimateDiff|motion|no family|not a|unknown|known", advice=OTHER)
def motion_module_as_a_model(builder: Builder) -> Settings:
    name = "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"
    return {"MODEL": builder.tensors("motion.safetensors", {name: (320,)})}


@broken("dreamy-nf4.safetensors", "4 bits|integers", advice=OTHER)
def checkpoint_in_nf4(builder: Builder) -> Settings:
    tensors = {}
    for key, it in builder.stock.single.items():
        is_linear = key.startswith("model.diffusion_model.") and it.ndim == 2
        tensors[key] = torch.zeros((it.numel() // 2, 1), dtype=torch.uint8) if is_linear else it
        if is_linear:
            tensors[f"{key}.absmax"] = torch.ones(it.numel() // 64 + 1)
    return {"MODEL": builder.tensors("dreamy-nf4.safetensors", tensors)}


@broken("dreamy.safetensors", "brushnet|not used|unexpected|unknown", advice=OTHER)
def checkpoint_with_further_tensors(builder: Builder) -> Settings:
    tensors = {
        **builder.stock.single,
        "model.diffusion_model.brushnet_blocks.0.weight": (64, 64),
    }
    return {"MODEL": builder.tensors("dreamy.safetensors", tensors)}


@broken("dreamy.safetensors", "lack|missing|middle_block", advice=AGAIN + "|" + OTHER)
def checkpoint_without_one_layer(builder: Builder) -> Settings:
    file = builder.single(
        "dreamy.safetensors", lambda key: None if "middle_block.2" in key else key
    )
    return {"MODEL": file}


@broken("dreamy.safetensors", "finite|NaN", advice=AGAIN + "|" + OTHER)
def checkpoint_with_nan(builder: Builder) -> Settings:
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    tensors = {**builder.stock.single, name: builder.stock.single[name] * float("nan")}
    return {"MODEL": builder.tensors("dreamy.safetensors", tensors)}


@broken("flux1-schnell.sft", r"\.safetensors", advice=advice("rename", "call", "name"))
def checkpoint_with_another_suffix(builder: Builder) -> Settings:
    return {"MODEL": builder.single("flux1-schnell.sft")}


@broken("notes.txt", advice=SERVE)
def text_file_as_a_model(builder: Builder) -> Settings:
    return {"MODEL": builder.bytes("notes.txt", b"https://model-site.example/models/4384\n")}


@broken("dreamy.toml", "prediction_type", advice=advice("correct", "use", "set", "write", "change"))
def defaults_of_a_checkpoint_with_a_mistake(builder: Builder) -> Settings:
    builder.bytes("dreamy.toml", b'prediction_type = "velocity"\n')
    return {"MODEL": builder.single("dreamy.safetensors")}
