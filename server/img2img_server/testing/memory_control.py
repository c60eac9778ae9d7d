"""The control channel in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from img2img_server.interfaces.queue import (
    ModelCommand,
    StreamNotice,
    UsageReport,
    WorkerCommand,
)
from img2img_server.testing.notifier import listed


class MemoryControl:
    """A Control in memory."""

    def __init__(self) -> None:
        self._cancel_handlers: list[Callable[[int], Awaitable[None]]] = []
        self._command_handlers: list[Callable[[WorkerCommand], Awaitable[None]]] = []
        self._model_handlers: list[Callable[[ModelCommand], Awaitable[None]]] = []
        self._notice_handlers: list[Callable[[StreamNotice], Awaitable[None]]] = []
        self._usage_handlers: list[Callable[[UsageReport], Awaitable[None]]] = []

    async def cancel(self, job_id: int) -> None:
        for handler in list(self._cancel_handlers):
            await handler(job_id)

    async def broadcast(self, command: WorkerCommand) -> None:
        for handler in list(self._command_handlers):
            await handler(command)

    @asynccontextmanager
    async def on_cancel(self, handler: Callable[[int], Awaitable[None]]) -> AsyncIterator[None]:
        with listed(self._cancel_handlers, handler):
            yield

    @asynccontextmanager
    async def on_command(
        self, handler: Callable[[WorkerCommand], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with listed(self._command_handlers, handler):
            yield

    async def command_model(self, command: ModelCommand) -> None:
        for handler in list(self._model_handlers):
            await handler(command)

    @asynccontextmanager
    async def on_model_command(
        self, handler: Callable[[ModelCommand], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with listed(self._model_handlers, handler):
            yield

    async def notify(self, notice: StreamNotice) -> None:
        for handler in list(self._notice_handlers):
            await handler(notice)

    @asynccontextmanager
    async def on_notice(
        self, handler: Callable[[StreamNotice], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with listed(self._notice_handlers, handler):
            yield

    async def report_usage(self, report: UsageReport) -> None:
        for handler in list(self._usage_handlers):
            await handler(report)

    @asynccontextmanager
    async def on_usage(
        self, handler: Callable[[UsageReport], Awaitable[None]]
    ) -> AsyncIterator[None]:
        with listed(self._usage_handlers, handler):
            yield
