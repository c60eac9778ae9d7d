"""The names of a UNet's layers in the code of Stable Diffusion's authors, which LoRA files for SDXL
and for ComfyUI have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_RESNET: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE: Final = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE: Final = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_LAYER: Final = re.compile(r"(down_blocks\.|up_blocks\.|mid_block)(\d*)\.(\w+)\.(\d+)\.?(.*)")


def original_unet_name(config: Mapping[str, Any], layer: str) -> str:
    """Returns the original name of a layer; empty if it has none.

    Args:
        config: The configuration of the UNet.
    """
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    match = _LAYER.fullmatch(layer)
    if match is None or not isinstance(layers := config["layers_per_block"], int):
        return ""
    side, kind, item, rest = match[1], match[3], int(match[4]), match[5]
    inner = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if side == "mid_block":
        place = _MIDDLE.get(f"{kind}.{item}")
        return f"middle_block.{place}.{inner}" if place else ""
    level, size = int(match[2]), layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{size * (level + 1)}.0.op"
    if kind == "upsamplers":
        has_attention = "CrossAttn" in config["up_block_types"][level]
        return f"output_blocks.{size * level + layers}.{2 if has_attention else 1}.conv"
    number = 0 if kind == "resnets" else 1
    if side == "down_blocks.":
        return f"input_blocks.{size * level + item + 1}.{number}.{inner}"
    return f"output_blocks.{size * level + item}.{number}.{inner}"
