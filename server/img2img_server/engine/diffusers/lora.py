"""Applies LoRA adapters to the weights in place. Rows with the same adapter share a batch.

An adapter is a small change of some weights: W + scale * alpha / rank * up @ down. Weights are
written when the adapter changes and not at each step, so steps are not slower, and compiled models
and CUDA graphs stay valid. The first use keeps a copy of each weight it changes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.families.base import Family, LoadedModel, LoraFile
from img2img_server.engine.family import ModelError

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Alphas are named after a module or after one of its factors: to_q.lora_A.weight.alpha
_ALPHA = re.compile(r"(\.lora_[AB])?(\.weight)?\.alpha$")


class _Change(NamedTuple):
    """The low-rank factors that an adapter adds to one weight."""

    weight: Tensor
    down: Tensor
    up: Tensor
    factor: float  # alpha / rank

    def delta(self) -> Tensor:
        """Returns the product of the factors: float32, of the weight's shape."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (product * self.factor).reshape(self.weight.shape)


@dataclass(slots=True)
class _Kept:
    """A weight and its original value, without any adapter."""

    weight: Tensor
    original: Tensor


class LoraSet:
    """The adapters that callers may name.

    Args:
        folder: Every .safetensors file in it is an adapter, named after the file; None for none.

    Raises:
        ModelError: A file is no LoRA, or of another model.
    """

    def __init__(self, model: LoadedModel, family: Family, folder: Path | None) -> None:
        files = sorted(folder.glob("*.safetensors")) if folder else []
        self._changes = {file.stem: _read(model, family, file) for file in files}
        self._fingerprint = hashlib.sha256(
            b"".join(
                file.stem.encode() + hashlib.sha256(file.read_bytes()).digest() for file in files
            )
        ).hexdigest()
        self._kept: dict[int, _Kept] = {}
        self._applied: Adapter | None = None
        self._is_half_written = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._changes)

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the names and files of all adapters."""
        return self._fingerprint

    def use(self, adapter: Adapter | None) -> None:
        """Writes the weights of this adapter. None restores the weights of the model.

        If it raises, for example for lack of memory, the next use writes all weights again.
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


def _read(model: LoadedModel, family: Family, file: Path) -> list[_Change]:
    try:
        content = family.read_lora(model, file)
        found = [
            change
            for part in family.lora_parts
            if (network := getattr(model.pipeline, part, None)) is not None
            for change in _changes(family, part, network, content)
        ]
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"LoRA {file.name} does not fit the model: {error}", setting="lora_dir"
        ) from error
    if not found:
        raise ModelError(
            f"LoRA {file.name} does not fit the model: it changes no weight", setting="lora_dir"
        )
    return found


def _changes(family: Family, part: str, network: Any, content: LoraFile) -> list[_Change]:
    """Returns the changes that a file makes to one part of the pipeline."""
    prefix = part + "."
    own: Mapping[str, Any] = {
        # Converters of diffusers add the prefix although the file has it already.
        key.removeprefix(prefix).removeprefix(prefix): value
        for entries in (content.weights, content.alphas)
        for key, value in entries.items()
        if key.startswith(prefix)
    }
    own = family.lora_keys(part, own)
    own_alphas = {_ALPHA.sub("", key): alpha for key, alpha in own.items() if _ALPHA.search(key)}
    default = content.metadata.get(f"{prefix}lora_alpha")
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
        change.delta()  # Raises RuntimeError if the shapes do not fit.
        found.append(change)
    return found


def _module(network: Any, name: str) -> Any:
    """Returns the module with a name, also if newer versions of transformers have removed a level
    of it.
    """
    try:
        return network.get_submodule(name)
    except AttributeError:
        return network.get_submodule(name.removeprefix("text_model."))
