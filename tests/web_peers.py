"""The peers of outbound connections: names, servers, and listeners that must get no connection."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import photos
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from img2img_server.domain.params import Limits
from img2img_server.imaging.fetch import fetch_image
from img2img_server.outbound.policy import OutboundPolicy

IMAGE = photos.jpeg()
# Host names of a test's server that the policy allows, because they are listed.
CDN = OutboundPolicy(hosts=frozenset({"files.test", "cdn.test"}))


class Names(AbstractResolver):
    """A resolver that returns addresses from a table, in order, and repeats the last one. It counts
    queries.
    """

    def __init__(self, *default: str, **answers: list[list[str]]) -> None:
        self._default = list(default)
        self._answers = {name.replace("_", "."): list(lists) for name, lists in answers.items()}
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        answers = self._answers.get(host, [self._default])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        if not addresses:
            raise OSError("no such name")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


class Listener:
    """Counts connections to any address of this machine."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nsecret")
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()


@asynccontextmanager
async def listening(host: str | None = None, port: int = 0) -> AsyncIterator[Listener]:
    """Yields a listener on one address, or on all addresses, including IPv6 if it is available."""
    listener = Listener()
    server = await asyncio.start_server(listener.accept, host or "0.0.0.0", port)
    listener.port = server.sockets[0].getsockname()[1]
    servers = [server]
    if host is None:
        with suppress(OSError):
            servers.append(await asyncio.start_server(listener.accept, "::", listener.port))
    try:
        yield listener
    finally:
        for each in servers:
            each.close()
            await each.wait_closed()


@asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[int]:
    """Yields the port of an HTTP server on 127.0.0.1."""
    app = web.Application(client_max_size=2**26)
    app.add_routes(routes)
    # By default, a connection that is opened while the server stops keeps it for a minute.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def every_request(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.RouteDef:
    """Returns a route that passes every request to one handler."""
    return web.route("*", "/{path:.*}", handle)


class Origin:
    """An HTTP server that sends given bytes and keeps the received requests."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.requests: list[bytes] = []
        self.handlers: set[asyncio.Task[None] | None] = set()
        self.port = 0

    @property
    def targets(self) -> list[str]:
        """The request targets of the request lines."""
        return [request.split(b"\r\n")[0].split(b" ", 1)[1].decode() for request in self.requests]

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handlers.add(asyncio.current_task())
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            answers = self.answers
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            begin, reset, _ = answer.partition(RESET)
            writer.write(begin)
            await writer.drain()
            if reset:
                linger = struct.pack("ii", 1, 0)  # With this option, close() sends RST.
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
                writer.transport.abort()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


RESET = b"RESET"  # The marker in a response at which the connection is reset.


def answer(status: int, body: bytes = b"", *headers: str) -> bytes:
    """Returns the bytes of an HTTP response that ends its connection."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@asynccontextmanager
async def origin(*answers: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    """Yields an Origin on 127.0.0.1. It repeats the last response; the default response is the
    image.
    """
    found = Origin(list(answers) or [answer(200, IMAGE)])
    server = await asyncio.start_server(found.accept, "127.0.0.1", 0, ssl=tls)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.gather(*filter(None, found.handlers))


async def image(request: web.Request) -> web.Response:
    return web.Response(body=IMAGE, content_type="image/jpeg")


def redirect(location: str, status: int = 302) -> Callable[[web.Request], web.Response]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": location})

    return answer


async def fetch(url: str, policy: OutboundPolicy, names: AbstractResolver, **more: object) -> bytes:
    return await fetch_image(url, policy=policy, resolver=names, limits=Limits(), **more)
