"""Commands to every worker and notices to every api, over plain NATS subjects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TypeVar

import nats.errors
from nats.aio.msg import Msg

from img2img_server.interfaces.queue import (
    ModelCommand,
    StreamNotice,
    UsageReport,
    WorkerCommand,
)
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import unavailable

T = TypeVar("T")

log = logging.getLogger(__name__)


class NatsControl:
    """A Control on core NATS: messages reach the roles that are connected, and are not stored.
    Methods raise UnavailableError; a method that returns a context raises it on entering the
    context.
    """

    def __init__(self, link: NatsConnection) -> None:
        self._link = link

    async def cancel(self, job_id: int) -> None:
        await self._send(subjects.CANCEL_SUBJECT, job_id)

    async def broadcast(self, broadcast: WorkerCommand) -> None:
        await self._send(subjects.COMMAND_SUBJECT, broadcast)

    async def command_model(self, command: ModelCommand) -> None:
        await self._send(subjects.MODELS_SUBJECT, command)

    def on_model_command(
        self, handler: Callable[[ModelCommand], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        return self._receive(subjects.MODELS_SUBJECT, ModelCommand, handler)

    async def notify(self, notice: StreamNotice) -> None:
        await self._send(subjects.STREAMS_SUBJECT, notice)

    def on_cancel(
        self, handler: Callable[[int], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        return self._receive(subjects.CANCEL_SUBJECT, int, handler)

    def on_command(
        self, handler: Callable[[WorkerCommand], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        return self._receive(subjects.COMMAND_SUBJECT, WorkerCommand, handler)

    def on_notice(
        self, handler: Callable[[StreamNotice], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        return self._receive(subjects.STREAMS_SUBJECT, StreamNotice, handler)

    async def report_usage(self, report: UsageReport) -> None:
        await self._link.send(subjects.USAGE_SUBJECT, codec.encode(report))

    def on_usage(
        self, handler: Callable[[UsageReport], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        return self._receive(subjects.USAGE_SUBJECT, UsageReport, handler)

    async def _send(self, subject: str, message: object) -> None:
        await self._link.send(subject, codec.encode(message))
        with unavailable():
            await self._link.nc.flush(timeout=2)

    @asynccontextmanager
    async def _receive(
        self, subject: str, kind: type[T], handler: Callable[[T], Awaitable[None]]
    ) -> AsyncIterator[None]:
        async def receive(msg: Msg) -> None:
            try:
                await handler(codec.decode(msg.data, kind))
            except codec.UndecodableError as error:  # a role of a later version sent the message
                log.info("control_message_ignored: %s: %s", subject, error)
            except Exception:
                # an error of one handler must not keep the next message from being handled
                log.exception("control_message_failed: %s: %r", subject, msg.data)

        await self._link.ready()
        with unavailable():
            subscription = await self._link.nc.subscribe(subject, cb=receive)
            # After this flush the server knows the subscription.
            await self._link.nc.flush(timeout=2)
        try:
            yield
        finally:
            with suppress(nats.errors.Error, asyncio.TimeoutError):
                await subscription.unsubscribe()
