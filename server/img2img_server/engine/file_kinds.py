"""Recognises files that are not what their name says, by their first bytes or their tensors.

The functions return the end of a sentence that begins with the path of the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

AGAIN: Final = "fetch the file again"

# Names of downloads that are not finished: of browsers, aria2, wget, curl and hub clients.
_UNFINISHED: Final = (".crdownload", ".part", ".partial", ".incomplete", ".aria2", ".download")
_ARCHIVE_NAMES: Final = (".zip", ".tar", ".gz", ".tgz", ".xz", ".7z", ".rar", ".zst")
# Endings of the files of other programs, with the names of their formats.
_FORMATS: Final = {
    ".onnx": "ONNX",
    ".mlmodelc": "Core ML",
    ".mlpackage": "Core ML",
    ".msgpack": "Flax",
    ".engine": "TensorRT",
    ".plan": "TensorRT",
    ".tflite": "TensorFlow Lite",
    ".h5": "TensorFlow",
}
# CLIP, T5 and language models in the layout of transformers
_TEXT_ENCODER: Final = re.compile(
    r"(text_model|encoder\.block|encoder\.final_layer_norm|shared|model\.(layers|embed_tokens|norm))\."
    r"|logit_scale$|text_projection|encoder\.embed_tokens\.|lm_head\."
)
_AUTOENCODER: Final = re.compile(r"(first_stage_model\.|vae\.)?(encoder|decoder)\.|.*quant_conv")
_CONTROL: Final = re.compile(r"^(control_model\.|controlnet_)|(^|\.)input_hint_block\.")
_EMBEDDING: Final = ("emb_params", "string_to_param", "clip_l", "clip_g")


def fault_of_content(head: bytes, expected: str) -> str:
    """Returns what a file is by its first bytes; empty if nothing is wrong with them.

    Args:
        expected: The content that the file should have, such as "weights".
    """
    if not head:
        return f"is empty: {AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        return (
            f"is a pointer of Git LFS instead of the {expected}: run `git lfs pull` in its "
            f"repository, or {AGAIN}"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"is an HTML or XML page instead of the {expected}: {AGAIN}"
    if not head.strip(b"\0"):
        return f"begins with zeros instead of {expected}, so its download is incomplete: {AGAIN}"
    return ""


def other_formats(folder: Path, names: Collection[str]) -> str:
    """Returns what to do with the files of a folder that are no weights of this service; empty if
    there are none.
    """
    for name in sorted(names):
        if name.lower().endswith(_UNFINISHED):
            return f"{folder / name} is a download that is not finished: fetch this file again"
    for name in sorted(names):
        if name.lower().endswith(_ARCHIVE_NAMES):
            return f"unpack {folder / name}, and name what it holds"
    if gguf := next((name for name in sorted(names) if name.lower().endswith(".gguf")), ""):
        return f"name {folder / gguf} with IMG2IMG_GGUF_FILE, or fetch the .safetensors files"
    form = format_of(names)
    return (
        f"they are in the format of {form}: fetch the model as .safetensors files" if form else ""
    )


def format_of(names: Collection[str]) -> str:
    """Returns the name of the format of another program that files have, or empty."""
    if any(name.startswith("openvino_") for name in names):
        return "OpenVINO"
    endings = (name[name.rfind(".") :].lower() for name in sorted(names) if "." in name)
    return next((_FORMATS[ending] for ending in endings if ending in _FORMATS), "")


def kind_of_addition(names: Collection[str]) -> str:
    """Returns what a file is that is no LoRA or embedding, and what to do with it; empty if its
    tensors are not known.
    """
    if any(name.startswith(("model.diffusion_model.", "cond_stage_model.")) for name in names):
        return "is the checkpoint of a model: name it with IMG2IMG_MODEL"
    return kind_of_tensors(names)


def kind_of_tensors(names: Collection[str]) -> str:
    """Returns what a file is that is no checkpoint of a known layout, and what to do with it; empty
    if its tensors are not known.
    """
    if any(name.startswith("model_ema.diffusion_model") for name in names):
        return "has only the EMA copy of its weights: use the file with the weights themselves"
    if any(name.startswith(("image_proj.", "ip_adapter.")) for name in names):
        return "is an IP-Adapter, which is not served: name the model that it belongs to"
    if any(_CONTROL.search(name) for name in names):
        return "is a ControlNet, which is not served: name the model that it belongs to"
    if any("lora" in name.lower() for name in names):
        return "is a LoRA, not a model: put it into IMG2IMG_LORA_DIR"
    if any("motion_modules." in name for name in names):
        return "is a motion module of AnimateDiff, which is not served: name a model of images"
    if all(_AUTOENCODER.match(name) for name in names):
        return (
            "holds an autoencoder only: name a model with IMG2IMG_MODEL. To replace its "
            "autoencoder, name a folder in diffusers' layout with IMG2IMG_VAE_DIR"
        )
    if any(name.startswith(_EMBEDDING) for name in names):
        return "is a textual inversion embedding, not a model: put it into IMG2IMG_EMBEDDINGS_DIR"
    if all(_TEXT_ENCODER.match(name) for name in names):
        return "holds a text encoder or a language model only: name a model of images"
    if "conv_in.weight" in names and any(name.startswith("down_blocks.") for name in names):
        return "is one part of a model, such as a UNet: name the folder of the whole model"
    return ""
