"""Bounds the connections of the gateway: their number, and the time that each state may take.

uvicorn has neither a limit for each peer nor a time limit for headers, for bodies that no endpoint
reads and for responses that no client reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final

import h11
from prometheus_client import Counter, Gauge
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from img2img_server.peers import is_in, peer_of

OPEN = Gauge("img2img_http_connections", "Open HTTP connections.")
CLOSED = Counter(
    "img2img_http_connections_closed_total",
    "HTTP connections that the gateway closed: another connection needed the place (`replaced`), "
    "or a state took too long.",
    ["why"],
)
SCOPE_KEY: Final = "img2img.connection"
KEEP_ALIVE_SECONDS: Final = 75  # longer than the idle timeout of common load balancers
# Seconds that a connection may stay in a state. Data that arrives does not begin the time again.
STATE_SECONDS: Final = {
    "header": 10.0,  # since the first byte of the header, or since the connection was opened
    "idle": KEEP_ALIVE_SECONDS + 5.0,  # between two requests, if uvicorn's own timer was stopped
    "unread_body": 10.0,  # after the response
    "response": 30.0,  # in which the client reads about 48 KiB of a response that it does not read
}
_READ_BYTES: Final = 64 * 1024
_FULL_BODY: Final = (
    b'{"status":"error","message":"Service temporarily unavailable. Please try again later.",'
    b'"retry_after":1}'
)
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL_BODY), _FULL_BODY)
)


class Connection:
    """An open connection. `owner`: the tenant of its request's key, or its peer."""

    def __init__(self, peer: str, abort: Callable[[], None]) -> None:
        self.peer = peer
        self.abort = abort
        self.owner = ""
        self.has_key = False


class Connections:
    """Shares the connections between peers and tenants: an owner has no more than it leaves free.

    A peer that needs one more loses its oldest connection without a valid key, so clients behind
    the same address as an attacker find a place. A proxy that is trusted has any number until its
    requests name their clients.
    """

    def __init__(self, most: int, trusted_proxies: Iterable[str] = ()) -> None:
        self._most = most
        self._trusted = tuple(trusted_proxies)
        self._held: dict[str, dict[Connection, None]] = {}
        self._count = 0

    def open(self, host: str, abort: Callable[[], None]) -> Connection | None:
        """Returns a new connection, or None if there is no place."""
        peer = f"proxy {host}" if is_in(host, self._trusted) else peer_of(host)
        connection = Connection(peer, abort)
        return connection if self._place(connection, peer, has_key=False) else None

    def claim(self, connection: Connection, owner: str, *, has_key: bool) -> bool:
        """Counts the connection to the owner of its request. Returns False if there is no place.

        `has_key`: the owner is the tenant of a valid key.
        """
        before = connection.owner, connection.has_key
        self.close(connection)
        if self._place(connection, owner, has_key=has_key):
            return True
        self._add(connection, *before)
        return False

    def end_request(self, connection: Connection) -> None:
        """Counts the connection to its peer again, as the latest one."""
        if connection.owner:
            self.close(connection)
            self._add(connection, connection.peer, False)

    def close(self, connection: Connection) -> None:
        """Stops counting the connection. A second call has no effect."""
        held = self._held.get(connection.owner, {})
        if connection in held:
            del held[connection]
            self._count -= 1
            OPEN.set(self._count)
            if not held:
                del self._held[connection.owner]
        connection.owner = ""

    def _place(self, connection: Connection, owner: str, *, has_key: bool) -> bool:
        held, free = self._held.get(owner, {}), self._most - self._count
        least = 1 if owner.startswith("proxy ") else len(held) + 1
        if free < least and not self._replace(owner, len(held)):
            return False
        self._add(connection, owner, has_key)
        return True

    def _add(self, connection: Connection, owner: str, has_key: bool) -> None:
        connection.owner, connection.has_key = owner, has_key
        self._held.setdefault(owner, {})[connection] = None
        self._count += 1
        OPEN.set(self._count)

    def _replace(self, owner: str, held: int) -> bool:
        """Closes the oldest connection without a key of the owner, or else of an owner with more.

        Returns False if there is none.
        """
        most_first = sorted(self._held, key=lambda each: -len(self._held[each]))
        for each in (owner, *(name for name in most_first if len(self._held[name]) > held)):
            for connection in self._held.get(each, {}):
                if not connection.has_key:
                    self.close(connection)
                    CLOSED.labels("replaced").inc()
                    connection.abort()
                    return True
        return False


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a place among the connections, and a time limit for each state."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._connections = connections
        self._connection: Connection | None = None
        self._state = ""
        self._timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        app: ASGIApp = self.app

        async def with_connection(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, SCOPE_KEY: self._connection}, receive, send)

        self.app = with_connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]  # asyncio's is 256 KiB
        host = self.client[0] if self.client else ""
        self._connection = self._connections.open(host, transport.abort)
        if self._connection is None:
            CLOSED.labels("full").inc()
            transport.write(_FULL)
            transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._reader_timer):
            if timer:
                timer.cancel()
        if self._connection:
            self._connections.close(self._connection)

    def data_received(self, data: bytes) -> None:
        if self._connection:
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        if self._connection:
            self._connections.end_request(self._connection)
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_timer = self._after("response")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer:
            self._reader_timer.cancel()

    def _watch(self) -> None:
        """Starts the timer of the connection's state when the state has changed."""
        state = self._current_state()
        if state == self._state:
            return
        self._state = state
        if self._timer:
            self._timer.cancel()
        self._timer = self._after(state) if state else None

    def _current_state(self) -> str:
        """Returns the state, or "" while the application works on a request."""
        if self.cycle and not self.cycle.response_complete:
            return ""
        if self.conn.their_state is h11.SEND_BODY:
            return "unread_body"
        return "header" if not self.cycle or self.conn.trailing_data[0] else "idle"

    def _after(self, state: str) -> asyncio.TimerHandle:
        def close() -> None:
            CLOSED.labels(state).inc()
            self.transport.abort()

        return self.loop.call_later(STATE_SECONDS[state], close)
