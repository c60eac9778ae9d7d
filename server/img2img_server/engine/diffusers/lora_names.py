"""Finds the layers of a model that a LoRA file means, whichever tool has written it.

Names that are those of a layer, as peft, kohya or LyCORIS spell them, are looked up. All other
names go through the converters of diffusers, with numbers in place of the weights: a number says
which output and which input of the file's layer it stands for. So a layer that a converter splits
into several is found for every form, although the converters know LoRA only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from img2img_server.engine.diffusers.families.base import Family, LoadedModel
from img2img_server.engine.diffusers.lora_forms import Group
from img2img_server.engine.diffusers.lora_options import LoraError
from img2img_server.engine.tensor_names import first_names

# More than any layer has outputs or inputs. float64 holds the products exactly.
_STRIDE = 1 << 24
_SPELLINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
_TEXT_ENCODERS = {
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_T5 = "lora_te3_"  # kohya's name of T5 in FLUX too, where it is the second encoder
_PEFT = "base_model.model."  # the beginning of the names of all layers in peft
# The names of the text encoders in ComfyUI: of CLIP by part, of others by the start of their class.
_COMFY_CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_COMFY_ENCODERS = {
    "T5": "t5xxl",
    "Gemma2": "gemma2_2b",
    "Qwen2_5_VL": "qwen25_7b",
    "Qwen3": "qwen3_4b",
}
_DENOISER = ("lora_unet_", "lora_transformer_", "lycoris_", "oft_unet_")
_PROCESSOR = re.compile(r"(.*\.attn\d?)\.(to_[qkv]|to_out)(\.0)?")  # older versions of diffusers


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A layer that a group changes.

    Attributes:
        rows, columns: The outputs and the inputs of the group that belong to it; None: all.
        is_original: Whether the file has the layer's name in the code of the model's authors.
    """

    part: str
    layer: str
    module: nn.Module
    rows: Tensor | None = None
    columns: Tensor | None = None
    is_original: bool = False

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.data

    def bias(self, group: Group) -> Tensor:
        """Returns the bias of the layer. Raises LoraError if it has none."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, Tensor):
            raise LoraError(f"{group.name} changes the bias of {self.layer}, which has none")
        return bias.data


def find_targets(
    model: LoadedModel, family: Family, groups: Sequence[Group]
) -> Mapping[str, tuple[Target, ...]]:
    """Returns the layers that each group changes, by the group's name.

    Raises:
        LoraError: A group belongs to no layer of the model, or to layers of another size.
    """
    layers = _layers(model, family)
    known = {
        alias: (target,) for target in layers.values() for alias in _aliases(model, family, target)
    } | _original_layers(model, family, layers.values())
    found: dict[str, tuple[Target, ...]] = {
        group.name: known[group.name] for group in groups if group.name in known
    }
    for group in groups:
        _check_outputs(group, found.get(group.name, ()))
    others = [group for group in groups if group.name not in found]
    if unsized := [group.name for group in others if 0 in group.shape]:
        raise _belongs_elsewhere(unsized)
    if others:
        found |= _converted(model, family, others, layers)
    return found


def _belongs_elsewhere(names: Sequence[str]) -> LoraError:
    return LoraError(
        f"the model has no layers for {first_names(names)}: the file belongs to another model"
    )


def _check_outputs(group: Group, pieces: tuple[Target, ...]) -> None:
    """Raises LoraError if a group has not all outputs of its layers, or more."""
    outputs, wanted = group.shape[0], sum(target.weight.shape[0] for target in pieces)
    # IA3 of the inputs has no outputs.
    if outputs and any(target.rows is not None for target in pieces) and outputs != wanted:
        raise LoraError(
            f"{group.name} is for a layer of {outputs} outputs, but its layers here have {wanted}: "
            "the file belongs to another model"
        )


def _layers(model: LoadedModel, family: Family) -> Mapping[tuple[str, str], Target]:
    """Returns every layer of the model with a weight, by the names of its part and its own."""
    return {
        (part, name): Target(part, name, module)
        for part in family.lora_parts
        if (network := getattr(model.pipeline, part, None)) is not None
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def _aliases(model: LoadedModel, family: Family, target: Target) -> Iterator[str]:
    """Yields the names that tools give to a layer."""
    name = target.layer
    if target.part != family.denoiser:
        yield from _encoder_aliases(model, target)
        return
    for prefix in ("", f"{target.part}.", "diffusion_model.", "model.diffusion_model."):
        yield prefix + name
    for prefix in _DENOISER:
        yield prefix + name.replace(".", "_")
    if match := _PROCESSOR.fullmatch(name):
        yield f"{match[1]}.processor.{match[2]}"


def _encoder_aliases(model: LoadedModel, target: Target) -> Iterator[str]:
    """Yields the names that tools give to a layer of a text encoder."""
    encoder = type(getattr(model.pipeline, target.part)).__name__
    prefixes = _TEXT_ENCODERS[target.part]
    if encoder.startswith("T5"):
        prefixes = (*prefixes, _T5)
    if encoder.startswith("CLIP"):
        in_comfy = _COMFY_CLIP.get(target.part, "")
    else:
        in_comfy = next(
            (_COMFY_ENCODERS[it] for it in _COMFY_ENCODERS if encoder.startswith(it)), ""
        )
    # Versions of transformers differ in the levels of the names.
    plain = target.layer.replace("language_model.", "").removeprefix("model.")
    names = (target.layer, f"text_model.{target.layer}", plain, f"model.{plain}")
    for name in dict.fromkeys(names):
        yield f"{target.part}.{name}"
        if in_comfy:
            yield f"text_encoders.{in_comfy}.transformer.{name}"
        for prefix in prefixes:
            yield prefix + name.replace(".", "_")


def _original_layers(
    model: LoadedModel, family: Family, layers: Iterable[Target]
) -> dict[str, tuple[Target, ...]]:
    """Returns the layers by their names in the code of the model's authors, where several may be
    one layer.
    """
    own = {target.layer: target for target in layers if target.part == family.denoiser}
    fused: dict[str, list[Target]] = {}
    for layer, name in family.original_layers(model.network, tuple(own)):
        fused.setdefault(name, []).append(own[layer])
    found: dict[str, tuple[Target, ...]] = {}
    for name, targets in fused.items():
        sizes = [target.weight.shape[0] for target in targets]
        rows: Sequence[Tensor | None] = (None,)
        if len(sizes) > 1:
            rows = torch.split(torch.arange(sum(sizes)), sizes)
        elif family.swaps_halves(model.network, targets[0].layer):
            rows = (torch.arange(sizes[0]).roll(sizes[0] // 2),)
        pieces = tuple(
            replace(target, rows=its_rows, is_original=target.layer != name)
            for target, its_rows in zip(targets, rows, strict=True)
        )
        for alias in _aliases(model, family, Target(family.denoiser, name, targets[0].module)):
            found[alias] = pieces
        if family.takes_peft_names:
            found[_PEFT + name] = pieces
    return found


def _converted(
    model: LoadedModel,
    family: Family,
    groups: Sequence[Group],
    layers: Mapping[tuple[str, str], Target],
) -> Mapping[str, tuple[Target, ...]]:
    """Returns the layers of groups whose names only diffusers' converters know."""
    lost = [group.name for group in groups]
    for spelling in (None, *_SPELLINGS):
        try:
            weights = family.convert_lora(model, _probes(groups, spelling))
        except Exception:  # noqa: S112 - the converters raise errors of many classes
            continue
        found = _trace(family, groups, weights, layers)
        lost = min(lost, [name for name, targets in found.items() if not targets], key=len)
        if not lost:
            return found
    if any(_PEFT in name for name in lost):
        raise LoraError(
            "it was saved by peft, whose alpha is in another file, adapter_config.json: save it "
            "with save_lora_weights of diffusers, which stores the alpha in the file"
        )
    raise _belongs_elsewhere(lost)


def _probes(groups: Sequence[Group], spelling: tuple[str, str] | None) -> dict[str, Tensor]:
    """Returns a LoRA of rank 1 for each group, whose values say their places.

    Args:
        spelling: The suffixes of the factors; None: those of the file.
    """
    found = {}
    for number, group in enumerate(groups):
        outputs, inputs = group.shape
        kernel = group.kernel_size or ()
        down, up = spelling or (
            group.suffixes.get("down", _SPELLINGS[1][0]),
            group.suffixes.get("up", _SPELLINGS[1][1]),
        )
        columns = torch.arange(1, inputs + 1, dtype=torch.float64)
        rows = torch.arange(1, outputs + 1, dtype=torch.float64) + number * _STRIDE
        ones = [1] * len(kernel)
        found[group.name + down] = columns.reshape(1, inputs, *ones).expand(1, inputs, *kernel)
        found[group.name + up] = rows.reshape(outputs, 1, *ones)
        if "alpha" in group.tensors:  # Some converters recognise files by their alphas.
            found[group.name + group.suffixes["alpha"]] = torch.tensor(1.0, dtype=torch.float64)
    return found


def _trace(
    family: Family,
    groups: Sequence[Group],
    weights: Mapping[str, Any],
    layers: Mapping[tuple[str, str], Target],
) -> dict[str, tuple[Target, ...]]:
    """Returns the layers in which the probes of each group have arrived."""
    found: dict[str, tuple[Target, ...]] = {group.name: () for group in groups}
    for part in family.lora_parts:
        prefix = f"{part}."
        own = family.lora_keys(
            part,
            {
                # Converters of diffusers add the prefix although the file has it already.
                key.removeprefix(prefix).removeprefix(prefix): value
                for key, value in weights.items()
                if key.startswith(prefix)
            },
        )
        for key, down in own.items():
            name = key.removesuffix(".lora_A.weight")
            layer = layers.get((part, name)) or layers.get((part, name.removeprefix("text_model.")))
            up = own.get(f"{name}.lora_B.weight")
            if name == key or layer is None or up is None or 1 not in (up.ndim, up.shape[-1]):
                continue
            group, rows, columns = _places(groups, down, up)
            target = Target(layer.part, layer.layer, layer.module, rows, columns)
            found[group.name] = (*found[group.name], target)
    return {name: _complete(groups, name, targets) for name, targets in found.items()}


def _places(
    groups: Sequence[Group], down: Tensor, up: Tensor
) -> tuple[Group, Tensor | None, Tensor | None]:
    """Returns the group of two converted factors, and the outputs and inputs that they have."""
    values = up.flatten().round().long()
    group = groups[int(values[0]) // _STRIDE]
    rows = values % _STRIDE - 1
    columns = down.flatten(2)[0, :, 0] if down.ndim > 2 else down[0]
    columns = columns.round().long() - 1
    outputs, inputs = group.shape
    return (
        group,
        None if torch.equal(rows, torch.arange(outputs)) else rows,
        None if torch.equal(columns, torch.arange(inputs)) else columns,
    )


def _complete(
    groups: Sequence[Group], name: str, targets: tuple[Target, ...]
) -> tuple[Target, ...]:
    """Returns the targets of a group if each of its outputs has arrived somewhere, else none."""
    outputs = next(group for group in groups if group.name == name).shape[0]
    arrived = {
        row
        for target in targets
        for row in (range(outputs) if target.rows is None else target.rows.tolist())
    }
    return targets if len(arrived) == outputs else ()
