"""nats-py's client with the corrections that the service needs.

The only module that overrides private methods of nats-py. docs/upstream/nats-py.md describes each
fault and proposes the change to nats-py; tests/unit/test_nats_patches.py fails when nats-py changes
one of these methods.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import nats.errors
from nats.aio.client import PING_PROTO, Client, Srv
from nats.aio.msg import Msg

from img2img_server.nats.access import WEBSOCKET
from img2img_server.tasks import reraise_cancellation

NO_INFO: Final = "nats: something else when expecting INFO message"
CLOSE_SECONDS: Final = 1.0
DENIED: Final = "permissions violation"  # prefix of the server's error about a missing permission


class PatchedClient(Client):
    """A NATS client that survives cancelled calls and reconnects after errors of the server.

    Args:
        needs_tls: Whether servers without TLS are rejected.

    Attributes:
        attempted: Host and port of the last server to which it tried to connect.
    """

    def __init__(self, *, needs_tls: bool) -> None:
        super().__init__()
        self._needs_tls = needs_tls
        self.attempted = ""

    @property
    def offers_jetstream(self) -> bool:
        """Whether the connected server itself runs JetStream."""
        return bool(self._server_info.get("jetstream"))

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        with reraise_cancellation():
            return await super().request(*args, **kwargs)

    async def close(self) -> None:
        await super().close()
        await self._close_transport()

    async def _close_transport(self) -> None:
        if transport := self._transport:
            transport.close()  # type: ignore[no-untyped-call]
            # The connection is broken, so its errors are ignored. Another task may have cancelled
            # the future that holds them.
            closed = asyncio.ensure_future(transport.wait_closed())  # type: ignore[no-untyped-call]
            await asyncio.wait([closed], timeout=CLOSE_SECONDS)
            closed.cancel()
            await asyncio.gather(closed, return_exceptions=True)

    async def _connect_to_server(self, s: Srv) -> None:
        self.attempted = s.uri.netloc
        await self._close_transport()  # the transport of an attempt that failed
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except ValueError as error:  # This error would end the attempts to reconnect.
            if isinstance(error, OSError):  # an untrusted certificate raises an error of both types
                raise
            raise nats.errors.Error(NO_INFO) from error

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        server = self._current_server
        # The TLS of a WebSocket is below the WebSocket's own transport.
        if initial_connection and self._needs_tls and server and server.uri.scheme not in WEBSOCKET:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _process_err(self, err_msg: str) -> None:
        if DENIED in err_msg.lower():
            await super()._process_err(err_msg)
            return
        error = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        # Behind the commands that wait to be written: `flush` promises that they have arrived.
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        if sid not in self._subs and reply.startswith(b"$JS.ACK."):
            await self.publish(reply.decode(), Msg.Ack.Nak)
        await super()._process_msg(sid, subject, reply, data, headers)
