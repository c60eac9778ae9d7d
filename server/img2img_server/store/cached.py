"""Announcements remembered for a moment: they change every few seconds, requests come faster."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.store.base import WorkerRegistry

T = TypeVar("T")


class CachedWorkerRegistry:
    """A WorkerRegistry whose answers may be `seconds` old. A model that is not known is not
    remembered: it may be announced any moment."""

    def __init__(self, registry: WorkerRegistry, *, seconds: float = 1.0) -> None:
        self._registry = registry
        self._seconds = seconds
        self._known: dict[str, tuple[float, Any]] = {}

    def forget(self) -> None:
        """The next question goes to the registry again."""
        self._known.clear()

    async def announce(self, worker: WorkerInfo) -> None:
        await self._registry.announce(worker)

    async def withdraw(self, name: str) -> None:
        await self._registry.withdraw(name)

    async def workers(self) -> list[WorkerInfo]:
        return await self._remembered("workers", self._registry.workers)

    async def models(self) -> list[ModelInfo]:
        return await self._remembered("models", self._registry.models)

    async def model(self, name: str) -> ModelInfo | None:
        return await self._remembered(f"model {name}", lambda: self._registry.model(name))

    async def _remembered(self, key: str, read: Callable[[], Awaitable[T]]) -> T:
        now = time.monotonic()
        read_at, value = self._known.get(key, (-self._seconds, None))
        if now - read_at < self._seconds:
            return value  # type: ignore[no-any-return]
        fresh = await read()
        if fresh:
            self._known[key] = (now, fresh)
        else:
            self._known.pop(key, None)
        return fresh
