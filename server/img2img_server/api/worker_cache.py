"""Caches the announcements of workers, which are read more often than they change."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.errors import UnavailableError
from img2img_server.interfaces.records import WorkerRegistry

T = TypeVar("T")
STALE_FACTOR = 2.0


class CachedWorkerRegistry:
    """A WorkerRegistry whose results may be `seconds` old. Older results, up to twice as old, are
    still returned while a background task reads them again, so that frequent callers never wait for
    NATS. The absence of a model is not cached: a worker may announce it at any time.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        *,
        seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._seconds = seconds
        self._clock = clock
        self._known: dict[str, tuple[float, Any]] = {}
        self._reading: dict[str, asyncio.Task[Any]] = {}

    def forget(self) -> None:
        """Clears the cache, and drops the results of reads that run now."""
        self._known = {}
        for reading in self._reading.values():
            reading.cancel()

    async def announce(self, worker: WorkerInfo) -> None:
        await self._registry.announce(worker)

    async def withdraw(self, name: str) -> None:
        await self._registry.withdraw(name)

    async def workers(self) -> list[WorkerInfo]:
        # All views are of one result: another one may still list a worker that has left.
        known = self._known.get("announced")
        serving = [worker for worker in await self.announced() if worker.serves]
        if serving or known is None or known is not self._known.get("announced"):
            return serving
        # The result was remembered: a worker may serve by now.
        found = await self._read("announced", self._registry.announced)
        return [worker for worker in found if worker.serves]

    async def announced(self) -> list[WorkerInfo]:
        return await self._remembered("announced", self._registry.announced)

    async def names(self) -> set[str]:
        return {worker.name for worker in await self.announced()}

    async def models(self) -> list[ModelInfo]:
        return await self._remembered("models", self._registry.models)

    async def model(self, name: str) -> ModelInfo | None:
        return await self._remembered(f"model {name}", lambda: self._registry.model(name))

    async def _remembered(self, key: str, read: Callable[[], Awaitable[T]]) -> T:
        read_at, value = self._known.get(key, (-math.inf, None))
        age = self._clock() - read_at
        if age < self._seconds:
            return value  # type: ignore[no-any-return]
        if age < STALE_FACTOR * self._seconds:
            if key not in self._reading:
                reading = self._reading[key] = asyncio.create_task(self._refresh(key, read))
                reading.add_done_callback(lambda _: self._reading.pop(key))
            return value  # type: ignore[no-any-return]
        return await self._read(key, read)

    async def _read(self, key: str, read: Callable[[], Awaitable[T]]) -> T:
        known, now = self._known, self._clock()
        fresh = await read()
        if fresh:
            known[key] = (now, fresh)
        else:
            known.pop(key, None)
        return fresh

    async def _refresh(self, key: str, read: Callable[[], Awaitable[T]]) -> None:
        with suppress(UnavailableError):  # This caller needs a fresh result, so it gets the error.
            await self._read(key, read)
