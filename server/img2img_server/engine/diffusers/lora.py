"""Reads the LoRA files of a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.families.base import Family, LoadedModel
from img2img_server.engine.diffusers.lora_file import read_lora_file
from img2img_server.engine.diffusers.lora_forms import Change
from img2img_server.engine.diffusers.lora_layers import LoraContent
from img2img_server.engine.diffusers.lora_names import Target, find_targets
from img2img_server.engine.diffusers.lora_options import LoraError
from img2img_server.engine.diffusers.watched_folder import WatchedFolder
from img2img_server.engine.tensor_names import first_names

_log = logging.getLogger(__name__)

# How many refused files are announced, and the length of a reason.
_REFUSALS, _REASON = 20, 300


class LoraSet:
    """The adapters that callers may name.

    A file that does not fit the model is logged with its reason and is not offered.

    Args:
        folder: Every .safetensors file in it is an adapter, named after the file; None for none.
    """

    def __init__(self, model: LoadedModel, family: Family, folder: Path | None) -> None:
        self._model = model
        self._family = family
        self._files = WatchedFolder("lora", folder, self._read)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files.seen)

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the names and files of all adapters."""
        return self._files.fingerprint

    def refresh(self) -> bool:
        """Reads new and changed files and drops deleted ones; any thread may call it. Returns
        whether anything has changed.
        """
        return self._files.refresh()

    @property
    def refusals(self) -> tuple[tuple[str, str], ...]:
        """The names of files that do not fit, each with the reason: at most 20 short ones."""
        refusals = sorted(self._files.refusals.items())
        return tuple((name, why[:_REASON]) for name, why in refusals[:_REFUSALS])

    def _read(self, file: Path) -> LoraContent:
        """Returns the content of a file.

        Raises:
            LoraError: It does not fit the model.
            OSError: It cannot be read at present.
        """
        changes = read_changes(self._model, self._family, file)
        _log.info("lora_offered: %s changes %d weights", file.stem, len(changes))
        return LoraContent.of(changes, self._family)

    def adapter(self, name: str, scale: float) -> Adapter:
        """Returns the adapter with the file that has this name now; any thread may call it."""
        return Adapter(name, scale, self._files.seen.get(name))


def read_changes(model: LoadedModel, family: Family, file: Path) -> tuple[Change, ...]:
    """Returns the changes that a file makes to the weights of a model.

    Raises:
        LoraError: The file does not fit, or has a tensor that would not be used.
        OSError: The file cannot be read at present.
    """
    content = read_lora_file(file)
    targets = _without_copies(file, find_targets(model, family, content.groups))
    changes = []
    for group in content.groups:
        for target in targets[group.name]:
            options = content.options_of(target.part)
            options.check()
            has_magnitude = "magnitude" in group.tensors or not group.changes_weight
            if options.values.get("use_dora") and not has_magnitude:
                raise LoraError(f"{group.name} has no magnitudes, although the file uses DoRA")
            place = target.part, target.layer, target.module
            if group.changes_weight:
                factor = group.factor(options, target.layer)
                pieces = target.rows, target.columns
                changes.append(Change(*place, target.weight, group, factor, *pieces))
            if found := group.bias(options, target.layer):
                bias, factor = found
                changes.append(Change(*place, target.bias(bias), bias, factor, target.rows))
    for change in changes:
        change.check()
    return tuple(changes)


def _without_copies(
    file: Path, targets: Mapping[str, Sequence[Target]]
) -> Mapping[str, Sequence[Target]]:
    """Returns the targets without second ones for a layer. Some trainers of Z-Image store a layer
    under the original name too, with `qkv` as one layer; diffusers skips these copies.

    Raises:
        LoraError: There are two targets for a layer, and none of them is such a copy.
    """
    found: dict[str, list[Target]] = {name: [] for name in targets}
    taken: dict[int, tuple[str, Target]] = {}
    copies = []
    in_order = [(name, target) for name, own in targets.items() for target in own]
    for name, target in sorted(in_order, key=lambda each: each[1].is_original):
        first, other = taken.setdefault(id(target.module), (name, target))
        if first == name:
            found[name].append(target)
        elif target.is_original and not other.is_original:
            copies.append(name)
        else:
            raise LoraError(
                f"it changes the layer {target.layer} twice, as {first} and as {name}: remove one "
                "of them from the file"
            )
    if copies:
        text = "lora_copies_unused: %s: %s are in the file under other names too"
        _log.warning(text, file.name, first_names(dict.fromkeys(copies)))
    return found
