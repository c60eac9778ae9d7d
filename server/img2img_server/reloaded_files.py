"""Values that are read from files while the process runs, and again when a file changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from img2img_server.settings import SettingsError

T = TypeVar("T")

log = structlog.get_logger()


class ReloadedFiles(Generic[T]):
    """The value of one or more files. Kubernetes replaces the files of a Secret while pods run."""

    def __init__(self, name: str, files: Sequence[Path], read: Callable[[], T]) -> None:
        """Reads the files.

        Args:
            name: The name of the files for the log, such as "api_keys".
            read: Reads the files and returns their value. Raises SettingsError.

        Raises:
            SettingsError: The files cannot be used.
        """
        self._name = name
        self._files = files
        self._read = read
        self._seen = self._state()  # the state of the files that were read last
        self._value = read()

    def current(self) -> T:
        """Returns the value. Reads the files if they have changed.

        Faulty files are logged once, and the value stays the one of before.
        """
        if (state := self._state()) != self._seen:
            self._seen = state
            try:
                self._value = self._read()
            except SettingsError as error:
                log.error(f"{self._name}_rejected_old_ones_stay_valid", error=str(error))
            else:
                log.info(f"{self._name}_read_again", files=[str(file) for file in self._files])
        return self._value

    def _state(self) -> list[tuple[int, ...] | None]:
        return [_state(file) for file in self._files]


def _state(file: Path) -> tuple[int, ...] | None:
    """Returns the times of the last changes of content and mode, the inode and the size, or None
    without a file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size
