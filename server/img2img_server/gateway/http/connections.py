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
    "waiting": 10.0,  # for a place
    "header": 10.0,  # since the first byte of the header, or since the connection was opened
    "idle": KEEP_ALIVE_SECONDS + 5.0,  # between two requests, if uvicorn's own timer was stopped
    "unread_body": 10.0,  # after the response
    "response": 30.0,  # in which the client reads about 48 KiB of a response that it does not read
}
_REPLACE_SECONDS: Final = 0.02
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
    """A connection. `owner`: the tenant of its request's key, or its peer; "" while it waits."""

    def __init__(
        self, peer: str, abort: Callable[[], None], admit: Callable[[], None] | None
    ) -> None:
        self.peer = peer
        self.abort = abort
        self.admit = admit
        self.owner = ""
        self.has_key = False


class Connections:
    """Shares the connections between peers and tenants: an owner has no more than it leaves free.

    Connections beyond that wait. Fifty times a second, the latest one that waits takes the place of
    the oldest connection of its peer without a valid key: so clients behind the same address as an
    attacker find a place, and a flood costs little. A proxy that is trusted has any number until
    its requests name their clients.
    """

    def __init__(self, most: int, trusted_proxies: Iterable[str] = ()) -> None:
        self._most = most
        self._trusted = tuple(trusted_proxies)
        self._held: dict[str, dict[Connection, None]] = {}
        self._count = 0
        self._waiting: dict[str, dict[Connection, None]] = {}
        self._waiting_count = 0
        self._pace: asyncio.TimerHandle | None = None

    def open(
        self, host: str, abort: Callable[[], None], admit: Callable[[], None] | None = None
    ) -> Connection | None:
        """Returns a new connection, or None if there is no place.

        `admit`: Called when a connection without an owner gets its place; None: it does not wait.
        """
        peer = f"proxy {host}" if is_in(host, self._trusted) else peer_of(host)
        connection = Connection(peer, abort, admit)
        if self._has_room(peer):
            self._add(connection, peer)
        elif admit is None or self._waiting_count >= self._most:
            return None
        else:
            self._waiting.setdefault(peer, {})[connection] = None
            self._waiting_count += 1
            if not self._pace:
                self._set_pace()
        return connection

    def claim(self, connection: Connection, owner: str, *, has_key: bool) -> bool:
        """Counts the connection to the owner of its request. Returns False if there is no place.

        `has_key`: the owner is the tenant of a valid key.
        """
        if connection.owner != owner:
            before = connection.owner, connection.has_key
            self._remove(connection)
            if not self._has_room(owner) and not self._replace(owner):
                self._add(connection, *before)
                return False
            self._add(connection, owner)
        connection.has_key = has_key
        self._admit_where_room()
        return True

    def end_request(self, connection: Connection) -> None:
        """Counts the connection to its peer again, as the latest one."""
        if connection.owner:
            self._remove(connection)
            self._add(connection, connection.peer)

    def close(self, connection: Connection) -> None:
        """Stops counting the connection. A second call has no effect."""
        if connection.owner:
            self._remove(connection)
            self._admit_where_room()
        elif connection in self._waiting.get(connection.peer, {}):
            self._leave(connection)

    def _has_room(self, owner: str) -> bool:
        least = 1 if owner.startswith("proxy ") else len(self._held.get(owner, {})) + 1
        return self._most - self._count >= least

    def _add(self, connection: Connection, owner: str, has_key: bool = False) -> None:
        connection.owner, connection.has_key = owner, has_key
        self._held.setdefault(owner, {})[connection] = None
        self._count += 1
        OPEN.set(self._count)

    def _remove(self, connection: Connection) -> None:
        held = self._held[connection.owner]
        del held[connection]
        if not held:
            del self._held[connection.owner]
        self._count -= 1
        OPEN.set(self._count)
        connection.owner = ""

    def _replace(self, owner: str) -> bool:
        """Closes the oldest connection without a key of the owner, or else of an owner with more.

        Returns False if there is none.
        """
        held = len(self._held.get(owner, {}))
        most_first = sorted(self._held, key=lambda each: -len(self._held[each]))
        for each in (owner, *(name for name in most_first if len(self._held[name]) > held)):
            for connection in self._held.get(each, {}):
                if not connection.has_key:
                    self._remove(connection)
                    CLOSED.labels("replaced").inc()
                    connection.abort()
                    return True
        return False

    def _leave(self, connection: Connection) -> None:
        """Removes a connection that waits."""
        waiting = self._waiting[connection.peer]
        del waiting[connection]
        if not waiting:
            del self._waiting[connection.peer]
        self._waiting_count -= 1

    def _admit_latest(self, peer: str) -> None:
        connection = next(reversed(self._waiting[peer]))
        self._leave(connection)
        self._add(connection, peer)
        assert connection.admit
        connection.admit()

    def _admit_where_room(self) -> None:
        for peer in list(self._waiting):
            if self._has_room(peer):
                self._admit_latest(peer)

    def _set_pace(self) -> None:
        self._pace = asyncio.get_running_loop().call_later(_REPLACE_SECONDS, self._replace_some)

    def _replace_some(self) -> None:
        for peer in list(self._waiting):
            if self._has_room(peer) or self._replace(peer):
                self._admit_latest(peer)
        self._pace = None
        if self._waiting:
            self._set_pace()


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
        self._connection = self._connections.open(host, transport.abort, self._admitted)
        if self._connection is None:
            self._refuse()
        elif not self._connection.owner:
            transport.pause_reading()
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

    def _admitted(self) -> None:
        self.transport.resume_reading()
        self._watch()

    def _refuse(self) -> None:
        CLOSED.labels("full").inc()
        self.transport.write(_FULL)
        self.transport.close()

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
        if self._connection and not self._connection.owner:
            return "waiting"
        if self.cycle and not self.cycle.response_complete:
            return ""
        if self.conn.their_state is h11.SEND_BODY:
            return "unread_body"
        return "header" if not self.cycle or self.conn.trailing_data[0] else "idle"

    def _after(self, state: str) -> asyncio.TimerHandle:
        def close() -> None:
            if state == "waiting":
                self._refuse()
                return
            CLOSED.labels(state).inc()
            self.transport.abort()

        return self.loop.call_later(STATE_SECONDS[state], close)
