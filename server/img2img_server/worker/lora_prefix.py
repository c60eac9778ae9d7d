"""Copies LoRA files from the bucket into the folder of LoRAs, and follows their changes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from img2img_server.errors import StorageError
from img2img_server.storage.interface import StoredFile

PAUSE_SECONDS: Final = 30.0
_SUFFIX: Final = ".safetensors"
# The names of the files that came from the bucket, with the tags of their contents.
_COPIED: Final = ".from-bucket.json"
_UNFINISHED: Final = ""  # the tag of a file that is about to be replaced

log = logging.getLogger(__name__)


class Listable(Protocol):
    """A store whose files can be listed and copied."""

    async def files(self, prefix: str) -> list[StoredFile]: ...

    async def save(self, key: str, file: Path) -> None: ...


class LoraPrefix:
    """The `.safetensors` files directly below a prefix of the bucket.

    A file of the folder that did not come from the bucket is never replaced or deleted.

    Args:
        prefix: The key up to the names of the files, such as `loras/`.
        folder: IMG2IMG_LORA_DIR, which the engine watches.
    """

    def __init__(self, store: Listable, prefix: str, folder: Path) -> None:
        self._store = store
        self._prefix = prefix if prefix.endswith("/") else f"{prefix}/"
        self._folder = folder
        self._failure = ""

    async def follow(self) -> None:
        """Repeats `refresh` for ever. A failure is logged once, and the files stay."""
        while True:
            try:
                await self.refresh()
                self._failure = ""
            except Exception as error:  # The next try may succeed.
                level = logging.DEBUG if str(error) == self._failure else logging.WARNING
                is_known = isinstance(error, (StorageError, OSError))
                text = "lora_prefix_unreadable: %s: %s"
                log.log(level, text, self._prefix, error, exc_info=not is_known)
                self._failure = str(error)
            await asyncio.sleep(PAUSE_SECONDS)

    async def refresh(self) -> None:
        """Copies new and changed files, and deletes those that the bucket has no more.

        Raises:
            StorageError: The bucket, or a file in it, cannot be read.
            OSError: The folder cannot be written.
        """
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        files = {
            PurePosixPath(file.key).name: file for file in await self._store.files(self._prefix)
        }
        found = {
            name: file
            for name, file in files.items()
            if name.lower().endswith(_SUFFIX) and not name.startswith(".")
        }
        copied = dict(await asyncio.to_thread(self._read_copied))
        failures: list[StorageError | OSError] = []
        for name, file in found.items():
            try:
                await self._copy(name, file, copied)
            except (StorageError, OSError) as error:  # One file must not stop the others.
                failures.append(error)
        for name in sorted(copied.keys() - found.keys()):
            await asyncio.to_thread((self._folder / name).unlink, missing_ok=True)
            del copied[name]
            await asyncio.to_thread(self._write_copied, copied)
            log.info("lora_deleted: %s is not in the bucket any more", name)
        if failures:
            raise failures[0]

    async def _copy(self, name: str, file: StoredFile, copied: dict[str, str]) -> None:
        """Copies a file that is new or has changed, and notes it in `copied`."""
        target, partial = self._folder / name, self._partial(name)
        is_there = await asyncio.to_thread(target.exists)
        if is_there and copied.get(name) == file.tag:
            return
        if is_there and name not in copied:
            log.debug("lora_not_copied: %s is in the folder already", name)
            return
        try:
            await self._store.save(file.key, partial)
            # If the second list cannot be written, the file still counts as one of the bucket.
            copied[name] = _UNFINISHED
            await asyncio.to_thread(self._write_copied, copied)
            await asyncio.to_thread(os.replace, partial, target)
        finally:
            await asyncio.to_thread(partial.unlink, missing_ok=True)
        await asyncio.to_thread(self._write_copied, {**copied, name: file.tag})
        copied[name] = file.tag
        log.info("lora_copied: %s, %d bytes", name, file.size_bytes)

    def _partial(self, name: str) -> Path:
        """Returns the path of an unfinished file, which no other process writes."""
        return self._folder / f".{name}.{os.getpid()}.part"

    def _read_copied(self) -> Mapping[str, str]:
        try:
            read = json.loads((self._folder / _COPIED).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:  # A disk was full, or another program has written it.
            log.warning("lora_list_unreadable: %s", self._folder / _COPIED)
            return {}
        return {str(name): str(tag) for name, tag in read.items()} if isinstance(read, dict) else {}

    def _write_copied(self, copied: Mapping[str, str]) -> None:
        partial = self._partial(_COPIED)
        partial.write_text(json.dumps(copied, indent=2), encoding="utf-8")
        partial.replace(self._folder / _COPIED)
