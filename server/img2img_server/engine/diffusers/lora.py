"""Applies LoRA adapters to the weights in place. Rows with the same adapter share a batch.

Weights are written when the adapter changes and not at each step, so steps are not slower, and
compiled models and CUDA graphs stay valid. The first use keeps a copy of each weight it changes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.families.base import Family, LoadedModel
from img2img_server.engine.diffusers.lora_forms import Change, LoraError, read_lora_file
from img2img_server.engine.diffusers.lora_names import find_targets
from img2img_server.errors import EngineError

_log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_OTHER_FORMATS = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(slots=True)
class _Kept:
    """A weight and its original value, without any adapter."""

    weight: Tensor
    original: Tensor


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file that was read. Equal for files of equal bytes.

    Attributes:
        version: Changes with the file's content.
        changes: Empty if the file was refused.
        digest: A hash of the file; empty if it was refused.
    """

    version: tuple[int, ...] = field(compare=False)
    changes: tuple[Change, ...] = field(compare=False)
    digest: bytes


class LoraSet:
    """The adapters that callers may name.

    A file that does not fit the model is logged with its reason and is not offered.

    Args:
        folder: Every .safetensors file in it is an adapter, named after the file; None for none.
    """

    def __init__(self, model: LoadedModel, family: Family, folder: Path | None) -> None:
        self._model = model
        self._family = family
        self._folder = folder
        self._refresh_lock = threading.Lock()
        self._seen: Mapping[str, _Seen] = {}
        self._kept: dict[int, _Kept] = {}
        self._applied: Adapter | None = None
        self._is_half_written = False
        self._pending: Mapping[str, tuple[int, ...]] = {}
        self._unreadable: set[str] = set()
        self._scan(is_start=True)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, seen in self._seen.items() if seen.changes)

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the names and files of all adapters."""
        files = sorted(self._seen.items())
        parts = [name.encode() + seen.digest for name, seen in files if seen.changes]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def refresh(self) -> bool:
        """Reads new and changed files and drops deleted ones; any thread may call it. A file is
        read when it was the same in two calls, so that a copy under way is not reported as damaged.
        Returns whether anything has changed.
        """
        return self._scan(is_start=False)

    def _scan(self, *, is_start: bool) -> bool:
        if self._folder is None:
            return False
        with self._refresh_lock:
            try:
                files = {file.stem: file for file in _adapter_files(self._folder)}
                versions = {name: _version(file) for name, file in files.items()}
            except OSError as error:  # A file was deleted just now, or a network disk is away.
                _log.warning("lora_dir_unreadable: %s", error)
                return False
            found: dict[str, _Seen] = {}
            for name, version in versions.items():
                old = self._seen.get(name)
                is_read = is_start or self._pending.get(name) == version
                if is_read and (old is None or old.version != version):
                    old = self._read(files[name], version) or old
                if old is not None:
                    found[name] = old
            self._unreadable.intersection_update(versions)
            has_changed = found != self._seen
            self._seen, self._pending = found, versions
            return has_changed

    def _read(self, file: Path, version: tuple[int, ...]) -> _Seen | None:
        """Reads a file, also one that is refused. Returns None if it cannot be read at present."""
        try:
            changes = _changes(self._model, self._family, file)
            seen = _Seen(version, changes, _digest(file) if changes else b"")
            if _version(file) != version:  # The hash may be of other bytes than the changes.
                return None
        except OSError as error:
            level = logging.DEBUG if file.stem in self._unreadable else logging.WARNING
            _log.log(level, "lora_unreadable: %s: %s", file.name, error)
            self._unreadable.add(file.stem)
            return None
        self._unreadable.discard(file.stem)
        if changes:
            _log.info("lora_offered: %s changes %d weights", file.stem, len(changes))
        return seen

    def adapter(self, name: str, scale: float) -> Adapter:
        """Returns the adapter with the file that has this name now; any thread may call it."""
        seen = self._seen.get(name)
        return Adapter(name, scale, seen if seen and seen.changes else None)

    def use(self, adapter: Adapter | None) -> None:
        """Writes the weights of this adapter. None restores the weights of the model.

        If it raises, for example for lack of memory, the next use writes all weights again.

        Raises:
            EngineError: There was no file when the adapter was made.
        """
        changes: tuple[Change, ...] = ()
        if adapter is not None:
            if not isinstance(adapter.content, _Seen):
                raise EngineError(f"the LoRA {adapter.name} was removed")
            changes = adapter.content.changes
        if adapter == self._applied and not self._is_half_written:
            return
        self._is_half_written = True
        for kept in self._kept.values():
            kept.weight.copy_(kept.original)
        if adapter is not None:
            self._write(changes, adapter.scale)
        self._applied = adapter
        self._is_half_written = False

    def _write(self, changes: tuple[Change, ...], scale: float) -> None:
        for change in changes:
            # Several LoRAs share one copy, also where each has a tensor object of its own.
            key = change.weight.data_ptr()
            if key not in self._kept:
                self._kept[key] = _Kept(change.weight, change.weight.clone())
            original = self._kept[key].original
            change.weight.copy_(change.weight.float() + change.delta(original, scale))


def _adapter_files(folder: Path) -> list[Path]:
    """Returns the LoRA files of a folder. Logs the files that cannot be offered."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        suffix = file.suffix.lower()
        if suffix in _OTHER_FORMATS:
            _log.debug("lora_ignored: %s is no .safetensors file", file.name)
        if suffix != _SUFFIX or file.name.startswith("."):
            continue
        if file.stem in found:
            _log.debug("lora_ignored: %s has the name of %s", file.name, found[file.stem].name)
        else:
            found[file.stem] = file
    return list(found.values())


def _version(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


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
