"""LoRA adapters, applied to the weights in place: rows with the same one share a batch.

An adapter is a small change of some weights: W + scale * alpha / rank * up @ down. Weights are
written anew when the adapter changes and not per step, so steps cost what they always do and
compiled models and CUDA graphs stay valid. The first use keeps a copy of each weight it changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.model_spec import ModelError

_PARTS = ("unet", "text_encoder", "text_encoder_2")
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Names of alphas are those of a module or of one of its factors: to_q.lora_A.weight.alpha
_ALPHA = re.compile(r"(\.lora_[AB])?(\.weight)?\.alpha$")


class _Change(NamedTuple):
    """What an adapter does to one weight, by its low-rank factors."""

    weight: Tensor
    down: Tensor
    up: Tensor
    factor: float  # alpha / rank

    def delta(self) -> Tensor:
        """Float32, of the weight's shape. The down of a convolution has its kernel."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (product * self.factor).reshape(self.weight.shape)


@dataclass(slots=True)
class _Kept:
    """A weight as the model came with it."""

    weight: Tensor
    original: Tensor


class LoraSet:
    """The adapters that callers may name.

    Args:
        pipeline: of diffusers, on its device.
        folder: every .safetensors file in it is one, named after the file; None: there are none.

    Raises:
        ModelError: a file is no LoRA, or of another model.
    """

    def __init__(self, pipeline: Any, folder: Path | None) -> None:
        files = sorted(folder.glob("*.safetensors")) if folder else []
        self._changes = {file.stem: _read(pipeline, file) for file in files}
        self._kept: dict[int, _Kept] = {}
        self._applied: Adapter | None = None
        self._is_half_written = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._changes)

    def use(self, adapter: Adapter | None) -> None:
        """Makes the networks those of this adapter; None: as the model came.

        Where it raises, for want of memory say, the next use writes all weights anew.
        """
        if adapter == self._applied and not self._is_half_written:
            return
        self._is_half_written = True
        for kept in self._kept.values():
            kept.weight.copy_(kept.original)
        if adapter is not None:
            self._write(adapter)
        self._applied = adapter
        self._is_half_written = False

    def _write(self, adapter: Adapter) -> None:
        for change in self._changes[adapter.name]:
            if id(change.weight) not in self._kept:
                self._kept[id(change.weight)] = _Kept(change.weight, change.weight.clone())
            original = self._kept[id(change.weight)].original
            change.weight.copy_(original.float() + adapter.scale * change.delta())


def _read(pipeline: Any, file: Path) -> list[_Change]:
    try:
        weights, alphas, metadata = pipeline.lora_state_dict(
            str(file), unet_config=pipeline.unet.config, return_lora_metadata=True
        )
        found = [
            change
            for part in _PARTS
            if (network := getattr(pipeline, part, None)) is not None
            for change in _changes(part, network, weights, alphas or {}, metadata or {})
        ]
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"LoRA {file.name} does not fit the model: {error}", setting="lora_dir"
        ) from error
    if not found:
        raise ModelError(
            f"LoRA {file.name} does not fit the model: it changes nothing of it", setting="lora_dir"
        )
    return found


def _changes(
    part: str,
    network: Any,
    weights: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    metadata: Mapping[str, Any],
) -> list[_Change]:
    """What one network's share of a file changes."""
    prefix = part + "."
    own: dict[str, Any] = {}
    for entries in (weights, alphas):
        own |= {key.removeprefix(prefix): w for key, w in entries.items() if key.startswith(prefix)}
    if part == "unet":
        own = convert_unet_state_dict_to_peft(own)  # type: ignore[no-untyped-call]
    elif own and not any(_DOWN in key for key in own):
        is_old = any("_lora." in key for key in own)
        form = StateDictType.DIFFUSERS_OLD if is_old else StateDictType.DIFFUSERS
        own = convert_state_dict_to_peft(own, form)  # type: ignore[no-untyped-call]
    own_alphas = {_ALPHA.sub("", key): alpha for key, alpha in own.items() if _ALPHA.search(key)}
    default = metadata.get(f"{prefix}lora_alpha")
    found = []
    for key, down in own.items():
        if not key.endswith(_DOWN):
            continue
        name = key.removesuffix(_DOWN)
        weight = _module(network, name).weight.data
        down, up = down.to(weight.device), own[name + _UP].to(weight.device)
        rank = down.shape[0]
        alpha = own_alphas.get(name, rank if default is None else default)
        change = _Change(weight, down, up, float(alpha) / rank)
        change.delta()  # raises RuntimeError where the shapes do not fit
        found.append(change)
    return found


def _module(network: Any, name: str) -> Any:
    """The module of a name, also where newer versions of transformers have a level less."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        return network.get_submodule(name.removeprefix("text_model."))
