"""The network between a caller and an api: a TCP relay with faults, and a proxy for HTTP/2."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

_LINGER_NOT = struct.pack("ii", 1, 0)  # With this option, close() sends RST.


class Relay:
    """Forwards bytes to `target`, "host:port", until a test breaks its connections."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    def reset(self) -> None:
        """Resets every connection, on both sides."""
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            writer.transport.abort()

    def fall_silent(self) -> None:
        """Drops all bytes on the open connections, without closing them."""
        self._silent |= self._writers

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Relay]:
        async with await asyncio.start_server(self._accept, "127.0.0.1", 0) as server:
            self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            try:
                yield self
            finally:
                server.close()
                self.reset()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:  # The target has stopped.
            writer.transport.abort()
            return
        self._writers.add(back)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if sink not in self._silent:
                    sink.write(data)
                    await sink.drain()
        self._writers.discard(sink)
        sink.close()


class StreamProxy:
    """An HTTP/2 proxy that ends streams without a message for `idle_seconds`.

    Like nginx, HAProxy and Envoy, it counts messages and not pings, sends RST_STREAM to the api and
    its own error to the caller.
    """

    def __init__(self, target: str, idle_seconds: float) -> None:
        self._target = target
        self._idle_seconds = idle_seconds
        self.address = ""
        self.methods: list[str] = []
        self.cuts = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StreamProxy]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._target, options=options) as channel:
            server = grpc.aio.server()
            server.add_generic_rpc_handlers([_Everything(self._handler(channel))])
            self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            try:
                yield self
            finally:
                await server.stop(None)

    def _handler(self, channel: grpc.aio.Channel) -> Any:
        def handler(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
            self.methods.append(details.method.rpartition("/")[2])
            upstream = channel.unary_stream(details.method)

            async def pass_on(request: bytes, context: Any) -> AsyncIterator[bytes]:
                kept = [item for item in context.invocation_metadata() if item[0] != "user-agent"]
                call = upstream(request, metadata=kept)
                messages = aiter(call)
                following: asyncio.Future[bytes] = asyncio.ensure_future(anext(messages))
                try:
                    while True:
                        await asyncio.wait({following}, timeout=self._idle_seconds)
                        if not following.done():
                            self.cuts += 1
                            call.cancel()
                            await context.abort(grpc.StatusCode.UNAVAILABLE, "upstream timed out")
                        yield following.result()
                        following = asyncio.ensure_future(anext(messages))
                except StopAsyncIteration:
                    return
                except grpc.aio.AioRpcError as error:
                    await context.abort(error.code(), error.details(), error.trailing_metadata())
                finally:
                    call.cancel()
                    await asyncio.gather(following, return_exceptions=True)

            return grpc.unary_stream_rpc_method_handler(pass_on)

        return handler


class _Everything(grpc.GenericRpcHandler):
    """Handles every method with the same handler."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, details: Any) -> Any:
        return self._handler(details)
