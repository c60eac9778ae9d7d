"""Describes text encoders in the layout of ComfyUI: inside a single file, or as files of their own.

The names of their tensors are those of transformers. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from img2img_server.engine.checkpoint import Shapes, clip_text, count
from img2img_server.engine.family import INDEX

# The names of text encoders in ComfyUI, by the part of the pipeline.
TEXT_ENCODERS: Final[Mapping[str, Mapping[str, str]]] = {
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "chroma": {"text_encoder": "t5xxl"},
    "z_image": {"text_encoder": "qwen3_4b"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
}
# The beginnings of the names of files that hold a part.
_FILES: Final[Mapping[str, tuple[str, ...]]] = {
    "clip_l": ("clip_l",),
    "clip_g": ("clip_g",),
    "t5xxl": ("t5xxl", "t5-v1_1-xxl", "t5_xxl"),
    "qwen3_4b": ("qwen_3_4b", "qwen3_4b", "qwen3-4b"),
    "vae": ("ae", "vae", "flux_vae"),
}
# Scaling and shift of the autoencoders, which no shape shows.
VAE_FACTORS: Final[Mapping[str, tuple[float, float | None]]] = {
    "sd": (0.18215, None),
    "sdxl": (0.13025, None),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
    "chroma": (0.3611, 0.1159),
    "z_image": (0.3611, 0.1159),
}


def inside(family: str, part: str) -> str:
    """Returns the beginning of the names that a text encoder has inside a single file; empty:
    files of the family hold none in this layout.
    """
    kind = TEXT_ENCODERS.get(family, {}).get(part)
    return f"text_encoders.{kind}.transformer." if kind else ""


def folder_of(parts_dir: Path, family: str) -> Path:
    """Returns the folder with the parts of a family: its own in the folder of all parts, or the
    folder itself if it is that of a model."""
    return parts_dir if (parts_dir / INDEX).is_file() else parts_dir / family


def file_of(parts_dir: Path, family: str, part: str) -> Path | None:
    """Returns the single file that holds a part, such as `t5xxl_fp16.safetensors`. It is in the
    family's folder or, a text encoder, next to it; files in 8 bits come last.
    """
    kind = TEXT_ENCODERS.get(family, {}).get(part, part)
    own = folder_of(parts_dir, family)
    folders = (own,) if part == "vae" else (own, parts_dir)
    for folder in folders:
        names = folder.iterdir() if folder.is_dir() else ()
        found = [
            path
            for path in names
            if path.suffix == ".safetensors" and path.name.lower().startswith(_FILES.get(kind, ()))
        ]
        if found:
            return min(found, key=lambda path: ("fp8" in path.name.lower(), path.name))
    return None


def text_config(class_name: str, shapes: Shapes, prefix: str) -> Mapping[str, Any] | None:
    """Returns the configuration of a text encoder; None if the file has none."""
    if class_name == "T5EncoderModel":
        return _t5(_own(shapes, prefix))
    if class_name == "Qwen3Model":
        return _qwen3(_own(shapes, f"{prefix}model."))
    return clip_text(shapes, prefix)


def _own(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }


def _t5(own: Shapes) -> Mapping[str, Any] | None:
    table = own.get("shared.weight") or own.get("encoder.embed_tokens.weight")
    first = "encoder.block.0.layer."
    bias = own.get(f"{first}0.SelfAttention.relative_attention_bias.weight")
    if table is None or bias is None:
        return None
    is_gated = f"{first}1.DenseReluDense.wi_0.weight" in own
    inner = own[f"{first}1.DenseReluDense.{'wi_0' if is_gated else 'wi'}.weight"][0]
    return {
        "vocab_size": table[0],
        "d_model": table[1],
        "d_kv": own[f"{first}0.SelfAttention.q.weight"][0] // bias[1],
        "d_ff": inner,
        "num_layers": count(own, "encoder.block."),
        "num_heads": bias[1],
        "relative_attention_num_buckets": bias[0],
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
    }


def _qwen3(own: Shapes) -> Mapping[str, Any] | None:
    if "embed_tokens.weight" not in own or "layers.0.self_attn.q_norm.weight" not in own:
        return None
    (head,) = own["layers.0.self_attn.q_norm.weight"]
    return {
        "vocab_size": own["embed_tokens.weight"][0],
        "hidden_size": own["embed_tokens.weight"][1],
        "intermediate_size": own["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": count(own, "layers."),
        "head_dim": head,
        "num_attention_heads": own["layers.0.self_attn.q_proj.weight"][0] // head,
        "num_key_value_heads": own["layers.0.self_attn.k_proj.weight"][0] // head,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        "max_position_embeddings": 40960,
    }
