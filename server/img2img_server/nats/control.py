"""Commands to every worker and notices to every api, over plain NATS subjects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import nats.errors
from nats.aio.msg import Msg

from img2img_server.interfaces.queue import StreamNotice, StreamState, WorkerCommand
from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import unavailable

log = logging.getLogger(__name__)

_ORDERS = frozenset(broadcast.value for broadcast in WorkerCommand)
_STREAM_STATES = frozenset(state.value for state in StreamState)


class NatsControl:
    """A Control on core NATS: who listens hears it, nothing is kept.

    Its methods raise UnavailableError, those that give a context on entering it.
    """

    def __init__(self, link: NatsConnection) -> None:
        self._link = link

    async def cancel(self, job_id: int) -> None:
        await self._tell(subjects.CANCEL_SUBJECT, str(job_id))

    async def broadcast(self, broadcast: WorkerCommand) -> None:
        await self._tell(subjects.COMMAND_SUBJECT, broadcast.value)

    def on_cancel(
        self, handler: Callable[[int], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        return self._listen(subjects.CANCEL_SUBJECT, lambda text: handler(int(text)))

    def on_command(
        self, handler: Callable[[WorkerCommand], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        async def run(text: str) -> None:
            if text in _ORDERS:  # otherwise it is one of a later version
                await handler(WorkerCommand(text))

        return self._listen(subjects.COMMAND_SUBJECT, run)

    async def notify(self, notice: StreamNotice) -> None:
        fields = {
            "state": notice.state.value,
            "tenant": notice.tenant,
            "job_id": notice.job_id,
            "grace_seconds": notice.grace_seconds,
        }
        await self._tell(subjects.STREAMS_SUBJECT, json.dumps(fields))

    def on_notice(
        self, handler: Callable[[StreamNotice], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        async def receive(text: str) -> None:
            fields = json.loads(text)
            if fields["state"] in _STREAM_STATES:  # otherwise it is one of a later version
                notice = StreamNotice(
                    state=StreamState(fields["state"]),
                    tenant=fields["tenant"],
                    job_id=fields["job_id"],
                    grace_seconds=fields["grace_seconds"],
                )
                await handler(notice)

        return self._listen(subjects.STREAMS_SUBJECT, receive)

    async def _tell(self, subject: str, text: str) -> None:
        await self._link.send(subject, text.encode())
        with unavailable():
            await self._link.nc.flush(timeout=2)

    @asynccontextmanager
    async def _listen(
        self, subject: str, handler: Callable[[str], Awaitable[None]]
    ) -> AsyncIterator[None]:
        async def receive(msg: Msg) -> None:
            try:
                await handler(msg.data.decode())
            except Exception:  # the next command must still be heard
                log.exception("%s %r", subject, msg.data)

        await self._link.ready()
        with unavailable():
            subscription = await self._link.nc.subscribe(subject, cb=receive)
            await self._link.nc.flush(timeout=2)  # from here on the server knows us
        try:
            yield
        finally:
            with suppress(nats.errors.Error, asyncio.TimeoutError):
                await subscription.unsubscribe()
