"""Reads the files of a folder, and reads new and changed ones again while the engine runs."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

from img2img_server.engine.family import access_cure

Content = TypeVar("Content")

_log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
IMAGES: Final = (".png", ".webp")
OTHER_FORMATS: Final = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft", ".zip")


class RefusedFileError(ValueError):
    """A file does not fit the model. The text says why."""


@dataclass(frozen=True, slots=True)
class Seen(Generic[Content]):
    """A file that was read. Equal for files of equal bytes.

    Attributes:
        version: Changes with the file's content.
        content: None if the file was refused.
        digest: A hash of the file; empty if it was refused.
        refusal: Why the file was refused, if that is known.
    """

    version: tuple[int, ...] = field(compare=False)
    content: Content | None = field(compare=False)
    digest: bytes
    refusal: str = ""


class WatchedFolder(Generic[Content]):
    """The .safetensors files of a folder, by their names without the suffix.

    Args:
        kind: The beginning of the log events, such as `lora`.
        folder: None: there are no files.
        read: Returns the content of a file. Raises OSError for a file that cannot be read at
            present, and RefusedFileError for one that does not fit. Any other error refuses the
            file too, and is logged with its traceback.
        other_formats: The endings of files that may have such a content in a form that is not read.
    """

    def __init__(
        self,
        kind: str,
        folder: Path | None,
        read: Callable[[Path], Content],
        other_formats: Collection[str] = OTHER_FORMATS,
    ) -> None:
        self._kind = kind
        self._other_formats = other_formats
        self._folder = folder
        self._read_content = read
        self._refresh_lock = threading.Lock()
        self._seen: Mapping[str, Seen[Content]] = {}
        self._pending: Mapping[str, tuple[int, ...]] = {}
        self._unreadable: set[str] = set()
        self._scan(is_start=True)

    @property
    def seen(self) -> Mapping[str, Seen[Content]]:
        """The files that were not refused, in the order of their names."""
        return {name: seen for name, seen in self._seen.items() if seen.content is not None}

    @property
    def refusals(self) -> Mapping[str, str]:
        """Why files were refused, by their names, if that is known."""
        return {name: seen.refusal for name, seen in self._seen.items() if seen.refusal}

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the names and bytes of these files."""
        return fingerprint_of(self.seen)

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
                if is_start:
                    self._log_ignored(self._folder)
                files = {file.stem: file for file in self._files(self._folder)}
                versions = {name: _version(file) for name, file in files.items()}
            except OSError as error:  # A file was deleted just now, or a network disk is away.
                _log.warning("%s_dir_unreadable: %s", self._kind, error)
                return False
            found: dict[str, Seen[Content]] = {}
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

    def _log_ignored(self, folder: Path) -> None:
        """Logs the files that are no candidates by their names or places."""
        for path in sorted(folder.iterdir()):
            name = path.name
            if name.startswith("."):
                continue
            if path.is_dir():
                if any(path.glob(f"*{_SUFFIX}")):
                    _log.warning(
                        "%s_ignored: %s is a subfolder, which is not read: move its files into %s",
                        *(self._kind, name, folder),
                    )
            elif path.suffix.lower() in self._other_formats and not _is_preview(path):
                _log.warning(
                    "%s_ignored: %s is no %s file: convert it, or remove it",
                    *(self._kind, name, _SUFFIX),
                )

    def _read(self, file: Path, version: tuple[int, ...]) -> Seen[Content] | None:
        """Reads a file, also one that is refused. Returns None if it cannot be read at present."""
        content: Content | None = None
        refusal = ""
        try:
            try:
                content = self._read_content(file)
            except OSError:
                raise
            except Exception as error:  # One foreign file must not stop the others.
                refusal = str(error) or type(error).__name__
                has_reason = isinstance(error, RefusedFileError)
                message = "%s_refused: %s: %s. Replace the file, or remove it from the folder"
                _log.warning(message, self._kind, file.name, refusal, exc_info=not has_reason)
            digest = b"" if content is None else _digest(file)
            seen = Seen(version, content, digest, refusal)
            if _version(file) != version:  # The hash may be of other bytes than the content.
                return None
        except OSError as error:
            level = logging.DEBUG if file.stem in self._unreadable else logging.WARNING
            message = "%s_unreadable: %s: %s%s"
            _log.log(level, message, self._kind, file.name, error, access_cure(error))
            self._unreadable.add(file.stem)
            return None
        self._unreadable.discard(file.stem)
        return seen

    def _files(self, folder: Path) -> list[Path]:
        """Returns the files of a folder. Logs the files that cannot be offered."""
        found: dict[str, Path] = {}
        for file in sorted(folder.iterdir()):
            suffix = file.suffix.lower()
            if suffix != _SUFFIX or file.name.startswith("."):
                continue
            if file.stem in found:
                other = found[file.stem].name
                _log.debug("%s_ignored: %s has the name of %s", self._kind, file.name, other)
            else:
                found[file.stem] = file
        return list(found.values())


def fingerprint_of(files: Mapping[str, Seen[Content]]) -> str:
    """Returns a hash of the names and bytes of files that were read."""
    parts = [name.encode() + seen.digest for name, seen in sorted(files.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _version(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _is_preview(path: Path) -> bool:
    """Returns whether a file is an image of what another file of the folder does."""
    if path.suffix.lower() not in IMAGES:
        return False
    stems = (file.stem for file in path.parent.glob(f"*{_SUFFIX}"))
    return any(path.name.startswith(f"{stem}.") for stem in stems)
