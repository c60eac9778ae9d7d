"""nats-py's client, mended where cancelled calls and late messages hurt it."""

from __future__ import annotations

import asyncio
from typing import Any

import nats.errors
from nats.aio.client import Client, Srv
from nats.aio.msg import Msg

from img2img_server.nats.access import WEBSOCKET, NatsAccess
from img2img_server.tasks import reraise_cancellation

NO_INFO = "nats: something else when expecting INFO message"
CLOSE_SECONDS = 1.0
DENIED = "permissions violation"  # what the server calls a missing permission


class ResilientClient(Client):
    """nats-py's client, with a read loop that survives callers who stop waiting.

    A cancelled or timed out flush leaves its cancelled future among the pongs to come; nats-py
    2.16 sets its result all the same, the loop dies of InvalidStateError, and with it everything
    that arrives until the next ping is missed.

    It sends each server the credentials that `access` has for it, also one that the cluster told
    about; it never goes on without TLS where TLS was asked for; and an error that the server sends
    later, such as an expired or changed user, makes it reconnect instead of closing for good.

    `attempted`: the server of the last attempt to connect.
    """

    def __init__(self, access: NatsAccess) -> None:
        super().__init__()
        self._access = access
        self.attempted = ""

    @property
    def offers_jetstream(self) -> bool:
        """Whether the server that we are connected to has JetStream itself."""
        return bool(self._server_info.get("jetstream"))

    async def _connect_to_server(self, s: Srv) -> None:
        self.attempted = s.uri.netloc
        await self._close_transport()
        await super()._connect_to_server(s)

    async def close(self) -> None:
        await super().close()
        await self._close_transport()

    async def _close_transport(self) -> None:
        """Closes what an attempt has left behind that failed: nats-py leaves it open."""
        if transport := self._transport:
            transport.close()  # type: ignore[no-untyped-call]
            # Of a connection that is broken anyway: its errors say nothing, and the future inside
            # may have been cancelled by somebody else.
            closed = asyncio.ensure_future(transport.wait_closed())  # type: ignore[no-untyped-call]
            await asyncio.wait([closed], timeout=CLOSE_SECONDS)
            closed.cancel()
            await asyncio.gather(closed, return_exceptions=True)

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except ValueError as error:  # nats-py would stop to reconnect
            if isinstance(error, OSError):  # a certificate that is not trusted is both
                raise
            raise nats.errors.Error(NO_INFO) from error

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # A WebSocket has its TLS below it, if any.
        websocket = (
            self._current_server is not None and self._current_server.uri.scheme in WEBSOCKET
        )
        if initial_connection and self._access.needs_tls and not websocket:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    def _connect_command(self) -> bytes:
        if login := self._access.login_at(self.attempted):
            self._auth_configured = True
            known = bool(login.user or login.password)
            self.options["user"] = login.user if known else None
            self.options["password"] = login.password if known else None
            self.options["token"] = login.token or None
        return super()._connect_command()

    async def _process_err(self, err_msg: str) -> None:
        if DENIED in err_msg.lower():
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        with reraise_cancellation():
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
