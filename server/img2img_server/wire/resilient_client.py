"""nats-py's client, mended where cancelled calls and late messages hurt it."""

from __future__ import annotations

import asyncio
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from img2img_server.tasks import heeding_cancel


class ResilientClient(Client):
    """nats-py's client, with a read loop that survives callers who stop waiting.

    A cancelled or timed out flush leaves its cancelled future among the pongs to come; nats-py
    2.16 sets its result all the same, the loop dies of InvalidStateError, and with it everything
    that arrives until the next ping is missed.
    """

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        with heeding_cancel():
            return await super().request(*args, **kwargs)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        # The server may send one more after it has confirmed an unsubscribe; dropped here, a job
        # would lie until its ack_wait is over.
        if sid not in self._subs and reply.startswith(b"$JS.ACK."):
            await self.publish(reply.decode(), Msg.Ack.Nak)
        await super()._process_msg(sid, subject, reply, data, headers)
