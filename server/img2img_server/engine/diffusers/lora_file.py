"""Reads LoRA files: groups their tensors by layer, whichever tool has written them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from img2img_server.engine.diffusers.lora_forms import Group
from img2img_server.engine.diffusers.lora_options import HEADER, LoraError, LoraOptions
from img2img_server.engine.family import ModelAccessError, ModelError
from img2img_server.engine.file_kinds import kind_of_addition
from img2img_server.engine.tensor_names import first_names
from img2img_server.engine.weight_files import read_header

_LORA = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    # XLabs has two LoRAs for each name, qkv_lora1 and qkv_lora2.
    ".down.weight": "down",
    ".up.weight": "up",
}
# The suffixes of tensors, longer ones first where one contains another.
_SUFFIXES = {
    **_LORA,
    ".lora_mid.weight": "mid",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_t2": "lokr_t2",
    ".diff": "diff",
    ".diff_b": "bias_diff",
    ".w_norm": "diff",
    ".b_norm": "bias_diff",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".a1.weight": "glora_a1",
    ".a2.weight": "glora_a2",
    ".b1.weight": "glora_b1",
    ".b2.weight": "glora_b2",
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".ia3": "ia3",
    ".on_input": "on_input",
    ".lora_A.weight.alpha": "alpha",
    ".lora_B.weight.alpha": "alpha",
    ".lora_down.weight.alpha": "alpha",
    ".alpha": "alpha",
}
_BY_LENGTH = sorted(_SUFFIXES, key=len, reverse=True)
# The name of the adapter, in files of peft's layers themselves
_ADAPTER = re.compile(
    r"(.*\.(?:lora_[AB]|lora_magnitude_vector|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?))"
    r"\.((?!weight|bias|alpha)[\w-]+)(\.(?:weight|bias))?"
)


_MERGE = "merge it into the model with the tool that made it, and serve the merged model"
# Forms that cannot be used, by a pattern of their tensors, each with what to do.
_REFUSED = {
    r"bundle_emb\..*": "has textual inversion embeddings of OneTrainer: save the LoRA without "
    "bundled embeddings, and put these into IMG2IMG_EMBEDDINGS_DIR as files of their own",
    r".*\.(set_weight|reshape_weight)": "replaces weights or changes their size (ComfyUI's "
    "set_weight and reshape_weight), as LoRAs with a control image do, which are not served: "
    f"{_MERGE}",
    r".*norm\.(query|key)_norm\.scale": "is a control LoRA of Black Forest Labs, which needs a "
    "control image and is not served: use a LoRA of a style",
    r".*\.(oft_R|boft_R|boft_s|ia3_l|vera_lambda_[bd]|randlora_\w+|lora_embedding_[AB])(\..*)?": (
        f"has a form of peft or OneTrainer that is neither LoRA, LoHa nor LoKr: {_MERGE}"
    ),
    r".*\.(lora_down|lora_up|qweight|wscales|smooth(_orig)?)": "is in the form of Nunchaku for "
    "quantised models: use the file that it was converted from",
}


def _refused_form(names: Iterable[str]) -> str:
    """Returns why a file is of a form that cannot be used, and what to do; empty if it is not."""
    found = {
        why: name
        for name in names
        for pattern, why in _REFUSED.items()
        if re.fullmatch(pattern, name)
    }
    return "; ".join(f"it {why} (its tensor {name})" for why, name in found.items())


@dataclass(frozen=True, slots=True)
class LoraFile:
    """The content of a LoRA file.

    Attributes:
        options: The options of peft, by NAME_OF_PART.OPTION, if the file has them.
    """

    groups: tuple[Group, ...]
    options: Mapping[str, Any]

    def options_of(self, part: str) -> LoraOptions:
        """Returns the options for one part of the pipeline."""
        prefix = f"{part}."
        own = {
            key.removeprefix(prefix): value
            for key, value in self.options.items()
            if key.startswith(prefix)
        }
        return LoraOptions(own)


def read_lora_file(file: Path) -> LoraFile:
    """Reads a .safetensors file.

    Raises:
        LoraError: It is damaged, or has a tensor that is no part of a LoRA.
        OSError: It cannot be read at present.
    """
    try:
        read_header(file)  # Its errors say what is wrong with the file.
    except ModelAccessError as error:
        raise OSError(str(error)) from error
    except ModelError as error:
        raise LoraError(str(error).replace(f"{file} ", "it ", 1)) from error
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            # Copies: a file that is replaced must not change or end the worker.
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoraError(f"it is no readable .safetensors file: {error}") from error
    tensors = _plain_names(tensors)
    names = tensors.keys()
    try:
        options = json.loads(header.get(HEADER, "{}"))
    except ValueError as error:
        raise LoraError(f"its header {HEADER} is no JSON") from error
    if not isinstance(options, dict):
        raise LoraError(f"its header {HEADER} is no JSON object")
    if why := _refused_form(names):
        raise LoraError(why)
    if not any(name.endswith(tuple(_SUFFIXES)) for name in names):
        if any("lora" in name.lower() for name in names):
            raise LoraError(f"it has a form of LoRA that is not known: {first_names(names)}")
        if kind := kind_of_addition(names):
            raise LoraError(f"it has no tensors of a LoRA: it {kind}")
    groups = _groups(tensors)
    for group in groups:
        group.check()
    return LoraFile(groups, options)


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors without the name of the adapter in their names, and with `ia3` as the name of
    the factors of IA3, which LyCORIS calls `weight`.

    Raises:
        LoraError: There are several adapters, or a tensor with and without the name of one.
    """
    adapters, found, twice = set(), {}, ""
    for key, tensor in tensors.items():
        if f"{key.removesuffix('.weight')}.on_input" in tensors:
            key = key.removesuffix(".weight") + ".ia3"
        elif match := _ADAPTER.fullmatch(key):
            adapters.add(match[2])
            key = match[1] + (match[3] or "")
        twice = twice or (key if key in found else "")
        found[key] = tensor
    if len(adapters) > 1:
        names = ", ".join(sorted(adapters))
        raise LoraError(f"it has several LoRAs, {names}: store each in a file of its own")
    if twice:
        raise LoraError(f"{twice} is in it twice, with and without the name of an adapter")
    return found


def _groups(tensors: Mapping[str, Tensor]) -> tuple[Group, ...]:
    found: dict[str, dict[str, str]] = {}
    foreign = []
    for key in tensors:
        suffix = next((suffix for suffix in _BY_LENGTH if key.endswith(suffix)), None)
        if suffix is None:
            foreign.append(key)
            continue
        keys = found.setdefault(key.removesuffix(suffix), {})
        if _SUFFIXES[suffix] in keys:
            raise LoraError(f"{key.removesuffix(suffix)} has two tensors for {_SUFFIXES[suffix]}")
        keys[_SUFFIXES[suffix]] = suffix
    if not found:
        raise LoraError("it has no tensors of a LoRA")
    if foreign:
        raise LoraError(f"it has tensors that are no part of a LoRA: {first_names(foreign)}")
    return tuple(
        Group(name, {role: tensors[name + suffix] for role, suffix in keys.items()}, keys)
        for name, keys in found.items()
    )
