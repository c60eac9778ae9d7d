"""Applies LoRA adapters to the weights in place. Rows with the same adapters share a batch.

Weights are written when the adapters change and not at each step, so steps are not slower, and
compiled models and CUDA graphs stay valid. The first use keeps a copy of each weight it changes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.families.base import Family, LoadedModel
from img2img_server.engine.diffusers.lora_forms import Change, LoraError, read_lora_file
from img2img_server.engine.diffusers.lora_names import find_targets
from img2img_server.engine.diffusers.watched_folder import Seen, WatchedFolder
from img2img_server.errors import EngineError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    """A weight and its original value, without any adapter."""

    weight: Tensor
    original: Tensor


class LoraSet:
    """The adapters that callers may name.

    A file that does not fit the model is logged with its reason and is not offered.

    Args:
        folder: Every .safetensors file in it is an adapter, named after the file; None for none.
    """

    def __init__(self, model: LoadedModel, family: Family, folder: Path | None) -> None:
        self._model = model
        self._family = family
        self._kept: dict[int, _Kept] = {}
        self._applied: tuple[Adapter, ...] = ()
        self._is_half_written = False
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

    def _read(self, file: Path) -> tuple[Change, ...] | None:
        """Returns the changes of a file; None if it does not fit, after it was logged."""
        changes = _changes(self._model, self._family, file)
        if changes:
            _log.info("lora_offered: %s changes %d weights", file.stem, len(changes))
        return changes or None

    def adapter(self, name: str, scale: float) -> Adapter:
        """Returns the adapter with the file that has this name now; any thread may call it."""
        return Adapter(name, scale, self._files.seen.get(name))

    def use(self, adapters: Sequence[Adapter]) -> None:
        """Writes the weights with the sum of the changes of these adapters. None of them restores
        the weights of the model.

        If it raises, for example for lack of memory, the next use writes all weights again.

        Raises:
            EngineError: There was no file when an adapter was made.
        """
        wanted = tuple(adapters)
        parts = [(self._changes_of(adapter), adapter.scale) for adapter in wanted]
        if wanted == self._applied and not self._is_half_written:
            return
        self._is_half_written = True
        for kept in self._kept.values():
            kept.weight.copy_(kept.original)
        for changes, scale in parts:
            self._write(changes, scale)
        self._applied = wanted
        self._is_half_written = False

    def _changes_of(self, adapter: Adapter) -> tuple[Change, ...]:
        if not isinstance(adapter.content, Seen):
            raise EngineError(f"the LoRA {adapter.name} was removed")
        return adapter.content.content or ()

    def _write(self, changes: tuple[Change, ...], scale: float) -> None:
        for change in changes:
            # Several LoRAs share one copy, also where each has a tensor object of its own.
            key = change.weight.data_ptr()
            if key not in self._kept:
                self._kept[key] = _Kept(change.weight, change.weight.clone())
            original = self._kept[key].original
            change.weight.copy_(change.weight.float() + change.delta(original, scale))


def _changes(model: LoadedModel, family: Family, file: Path) -> tuple[Change, ...]:
    """Returns the changes of a file; none if it does not fit the model, after it was logged.

    Raises:
        OSError: The file cannot be read at present.
    """
    try:
        return read_changes(model, family, file)
    except OSError:
        raise
    except Exception as error:  # One foreign file must not stop the others.
        is_known = isinstance(error, LoraError)
        _log.warning("lora_refused: %s: %s", file.name, error, exc_info=not is_known)
        return ()


def read_changes(model: LoadedModel, family: Family, file: Path) -> tuple[Change, ...]:
    """Returns the changes that a file makes to the weights of a model.

    Raises:
        LoraError: The file does not fit, or has a tensor that would not be used.
        OSError: The file cannot be read at present.
    """
    content = read_lora_file(file)
    targets = find_targets(model, family, content.groups)
    changes = []
    for group in content.groups:
        for target in targets[group.name]:
            options = content.options_of(target.part)
            options.check()
            if options.values.get("use_dora") and "magnitude" not in group.tensors:
                raise LoraError(f"{group.name} has no magnitudes, although the file uses DoRA")
            factor = group.factor(options, target.layer)
            change = Change(target.weight, group, factor, target.rows, target.columns)
            change.check(target.layer)
            changes.append(change)
    return tuple(changes)
