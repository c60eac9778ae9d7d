"""A file store that waits for the bucket while it cannot be used, and monitors itself."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from img2img_server.errors import StorageError
from img2img_server.storage.interface import BlobStore
from img2img_server.telemetry import STORE_WAITING_BYTES

# seconds between attempts while the store cannot be used; the last value repeats
PAUSES_SECONDS: Final = (1.0, 2.0, 5.0, 10.0)
IDLE_PROBE_SECONDS: Final = 60.0  # seconds without an upload after which the store is tested
SLOW_SECONDS: Final = 5.0  # seconds after which an upload counts as waiting
# A store that cannot be reached for longer counts as away: other workers may reach it.
AWAY_SECONDS: Final = 120.0
MOST_REFUSALS: Final = 3  # refusals of one file by a store that takes other files
WAIT_SECONDS: Final = 600.0
WAIT_BYTES: Final = 256 * 2**20

OnWait = Callable[[str], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Upload:
    """A file that waits for the store. `retry` is set when its owner should try again."""

    error: StorageError
    refusals: int = 0
    retry: asyncio.Event = field(default_factory=asyncio.Event)


class WatchedBlobs:
    """Stores and deletes files in another store. `put` waits while that store cannot be used.

    `trouble` has the reason while files cannot be stored, and is empty otherwise.

    Args:
        wait_seconds: The longest wait of a file.
        wait_bytes: The bytes of files that are being stored or wait, at which the worker should
            take no more jobs.
    """

    def __init__(
        self,
        blobs: BlobStore,
        pauses_seconds: Sequence[float] = PAUSES_SECONDS,
        *,
        wait_seconds: float = WAIT_SECONDS,
        wait_bytes: int = WAIT_BYTES,
        away_seconds: float = AWAY_SECONDS,
        slow_seconds: float = SLOW_SECONDS,
        idle_seconds: float = IDLE_PROBE_SECONDS,
    ) -> None:
        self._blobs = blobs
        self._pauses_seconds = pauses_seconds
        self._wait_seconds = wait_seconds
        self._wait_bytes = wait_bytes
        self._away_seconds = away_seconds
        self._slow_seconds = slow_seconds
        self._idle_seconds = idle_seconds
        self._failed = asyncio.Event()
        self._changed = asyncio.Event()
        self._failing_since: float | None = None
        self._used_at = 0.0  # monotonic time of the last success
        self._refuses = False
        self._waiting: deque[_Upload] = deque()
        self._bytes = 0
        self.trouble = ""

    @property
    def takes_work(self) -> bool:
        """Whether the worker should take jobs: their files can be stored, or held until the store
        is back.
        """
        return not self.is_away and self._bytes < self._wait_bytes

    @property
    def is_away(self) -> bool:
        """Whether the store refuses this worker, or cannot be reached for a long time."""
        if self._failing_since is None:
            return False
        long_ago = asyncio.get_running_loop().time() - self._failing_since > self._away_seconds
        return self._refuses or long_ago

    async def until_takes_work(self) -> None:
        """Waits until `takes_work` is true."""
        while not self.takes_work:
            await self.changed(self._away_seconds)

    async def changed(self, seconds: float) -> None:
        """Waits for a change of the store's state, at most that many seconds."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def watch(self) -> None:
        """Tests the store after a failure, and when nothing was stored for a while. Runs until it
        is cancelled.
        """
        self._used_at = asyncio.get_running_loop().time()
        while True:
            await self._until_test_is_due()
            pauses = iter(self._pauses_seconds)
            pause = 0.0
            while self._failing_since is not None:
                pause = next(pauses, pause)
                await asyncio.sleep(pause)
                await self._test()

    async def _until_test_is_due(self) -> None:
        """Returns after a failure, or after a test of a store that was idle."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(max(loop.time(), self._used_at + self._idle_seconds)):
                await self._failed.wait()
        except TimeoutError:
            if loop.time() - self._used_at >= self._idle_seconds:
                await self._probe()

    async def _test(self) -> None:
        """Lets one waiting upload try again; stores a small file if none waits."""
        for _ in range(len(self._waiting)):
            self._waiting.rotate(-1)
            if not self._waiting[-1].retry.is_set():
                self._waiting[-1].retry.set()
                return
        if not self._waiting:
            await self._probe()

    async def _probe(self) -> bool:
        try:
            await self._blobs.prove_writable()
        except StorageError as error:
            self._note(error)
            return False
        self._recover()
        return True

    def _note(self, error: StorageError) -> None:
        is_new = self._failing_since is None
        if self._failing_since is None:
            self._failing_since = asyncio.get_running_loop().time()
        is_new |= self._refuses is not error.final
        self.trouble = error.detail or str(error)
        self._refuses = error.final
        self._failed.set()
        if is_new:
            effect = "no jobs are pulled" if error.final else "finished images wait for it"
            log.warning("object_store_unavailable: %s: %s", effect, self.trouble)
            self._changed.set()

    def _recover(self) -> None:
        self._used_at = asyncio.get_running_loop().time()
        if self._failing_since is not None:
            seconds = self._used_at - self._failing_since
            log.warning("object_store_available after %.0f s", seconds)
            self._failing_since = None
            self._refuses = False
            self.trouble = ""
            self._failed.clear()
            self._changed.set()
        for upload in self._waiting:
            upload.retry.set()

    async def put(
        self, key: str, data: bytes, media_type: str, on_wait: OnWait | None = None
    ) -> None:
        """Stores a file; waits while the store cannot be used.

        Args:
            on_wait: called once with the reason if the file has to wait.

        Raises:
            StorageError: The store refuses this file, or the wait took too long.
        """
        self._bytes += len(data)
        STORE_WAITING_BYTES.set(self._bytes)
        storing = asyncio.ensure_future(self._store(key, data, media_type))
        try:
            done, _ = await asyncio.wait({storing}, timeout=self._slow_seconds)
            if on_wait and not (done and storing.exception() is None):
                await on_wait(self._reason(storing if done else None))
            try:
                return await storing
            except StorageError as error:
                await self._wait(error, key, data, media_type)
        finally:
            storing.cancel()
            self._bytes -= len(data)
            STORE_WAITING_BYTES.set(self._bytes)
            self._changed.set()

    def _reason(self, failed: asyncio.Future[None] | None) -> str:
        """Returns why a file waits, a sentence for the caller."""
        error = failed.exception() if failed else None
        return str(error) if error else "the object store does not respond"

    async def _store(self, key: str, data: bytes, media_type: str) -> None:
        try:
            await self._blobs.put(key, data, media_type)
        except StorageError as error:
            self._note(error)
            raise
        self._recover()

    async def _wait(self, error: StorageError, key: str, data: bytes, media_type: str) -> None:
        """Repeats the upload whenever `watch` or the success of another upload asks for it."""
        upload = _Upload(error)
        self._waiting.append(upload)
        if self._failing_since is None:  # Another file was stored since the failure.
            upload.retry.set()
        try:
            async with asyncio.timeout(self._wait_seconds):
                while not await self._try(upload, key, data, media_type):
                    pass
        except TimeoutError:
            raise upload.error from None
        finally:
            self._waiting.remove(upload)

    async def _try(self, upload: _Upload, key: str, data: bytes, media_type: str) -> bool:
        """Waits for the upload's turn, and returns whether it succeeded."""
        await upload.retry.wait()
        try:
            await self._store(key, data, media_type)
        except StorageError as error:
            upload.error = error
            upload.refusals += error.final
            if upload.refusals >= MOST_REFUSALS and await self._probe():
                raise  # The store takes other files.
            return False
        finally:
            upload.retry.clear()
        return True

    async def delete(self, key: str) -> None:
        await self._blobs.delete(key)
