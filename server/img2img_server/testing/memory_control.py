"""Commands inside one process, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from img2img_server.interfaces.queue import StreamNotice, WorkerCommand

T = TypeVar("T")


class MemoryControl:
    """A Control of one process."""

    def __init__(self) -> None:
        self._cancel_handlers: list[Callable[[int], Awaitable[None]]] = []
        self._order_handlers: list[Callable[[WorkerCommand], Awaitable[None]]] = []
        self._notice_handlers: list[Callable[[StreamNotice], Awaitable[None]]] = []

    async def cancel(self, job_id: int) -> None:
        for handler in list(self._cancel_handlers):
            await handler(job_id)

    async def broadcast(self, broadcast: WorkerCommand) -> None:
        for handler in list(self._order_handlers):
            await handler(broadcast)

    @asynccontextmanager
    async def on_cancel(self, handler: Callable[[int], Awaitable[None]]) -> AsyncIterator[None]:
        with _listed(self._cancel_handlers, handler):
            yield

    @asynccontextmanager
    async def on_command(
        self, handler: Callable[[WorkerCommand], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with _listed(self._order_handlers, handler):
            yield

    async def notify(self, notice: StreamNotice) -> None:
        for handler in list(self._notice_handlers):
            await handler(notice)

    @asynccontextmanager
    async def on_notice(
        self, handler: Callable[[StreamNotice], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with _listed(self._notice_handlers, handler):
            yield


@contextmanager
def _listed(handlers: list[T], handler: T) -> Iterator[None]:
    handlers.append(handler)
    try:
        yield
    finally:
        handlers.remove(handler)
