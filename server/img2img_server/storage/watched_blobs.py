"""A file store that monitors itself, so that no job starts while files cannot be stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from img2img_server.errors import StorageError
from img2img_server.storage.interface import BlobStore

# seconds between probes; the last value repeats
PAUSES_SECONDS: Final = (1.0, 2.0, 5.0, 10.0, 30.0)

log = logging.getLogger(__name__)


class WatchedBlobs:
    """Stores and deletes files in another store, and probes that store after a failed `put`.

    `healthy` is set while files can be stored. Otherwise `trouble` has the reason.
    """

    def __init__(self, blobs: BlobStore, pauses_seconds: Sequence[float] = PAUSES_SECONDS) -> None:
        self._blobs = blobs
        self._pauses_seconds = pauses_seconds
        self._failed = asyncio.Event()
        self.healthy = asyncio.Event()
        self.healthy.set()
        self.trouble = ""

    async def watch(self) -> None:
        """Probes the store after a failed `put`. Runs until it is cancelled."""
        while True:
            await self._failed.wait()
            pauses = iter(self._pauses_seconds)
            pause = 0.0
            while not self.healthy.is_set():  # The loop ends after a successful probe or put.
                pause = next(pauses, pause)
                await asyncio.sleep(pause)
                try:
                    await self._blobs.prove_writable()
                except StorageError as error:
                    self._note(error)
                else:
                    self._recover()

    def _note(self, error: StorageError) -> None:
        self.trouble = error.detail or str(error)
        self.healthy.clear()
        self._failed.set()
        log.warning("object_store_unavailable: no jobs are pulled: %s", self.trouble)

    def _recover(self) -> None:
        if not self.healthy.is_set():
            log.warning("object_store_available")
        self.trouble = ""
        self.healthy.set()
        self._failed.clear()

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        try:
            await self._blobs.put(key, data, media_type)
        except StorageError as error:
            self._note(error)
            raise
        self._recover()

    async def delete(self, key: str) -> None:
        await self._blobs.delete(key)
