"""Middleware of all requests: the path, the log line, metrics, the span, and limits."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable
from typing import Final, TypeAlias

import structlog
from opentelemetry import trace
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from img2img_server.budget import Budget, Share
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.errors import InternalError, ServerBusyError
from img2img_server.gateway.http.callers import Callers, KeySearch, header_key
from img2img_server.gateway.http.connections import SCOPE_KEY, Connection, Connections
from img2img_server.gateway.http.request_ids import RESPONSE_HEADER
from img2img_server.peers import peer_of
from img2img_server.tracing import end, enter, extracted

REQUESTS = Counter("img2img_http_requests_total", "HTTP requests.", ["route", "method", "code"])
SECONDS = Histogram(
    "img2img_http_request_seconds",
    "Time until the response was sent completely.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
PROBES = ("/healthz", "/readyz")
# Bytes of bodies without a valid key. A single peer can send one of the largest size.
PEER_BYTES: Final = 64 * 2**20
UNCOUNTED_BYTES: Final = 16 * 2**10  # of each body without a valid key
_NO_ROOM: Final = (
    "This gateway has as many open requests of the key or the address as it takes; try again later"
)
# Returns the response to a rejected request, in the format of its path.
Refuse: TypeAlias = Callable[[Scope, RequestError], Response]
log = structlog.get_logger()


class NormalizePath:
    """Removes doubled slashes and one at the end. A redirect would turn a POST into a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = re.sub("/{2,}", "/", scope["path"]).removesuffix("/") or "/"
        await self._app({**scope, "path": path}, receive, send)


class AccessLog:
    """Logs, counts and traces each request, and answers 500 when the application raises.

    The log has the template of the route, never the path, the query or a header, which may contain
    keys.
    """

    def __init__(self, app: ASGIApp, *, refuse: Refuse) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        code = 0
        started = time.monotonic()
        is_probe = scope["path"] in PROBES
        span: trace.Span = trace.INVALID_SPAN
        if not is_probe:
            parent = extracted(Headers(scope=scope).items())
            span = enter("http request", parent, SpanKind.SERVER)

        async def send_noting_code(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                if request_id := scope.get("state", {}).get("request_id", ""):
                    MutableHeaders(scope=message)[RESPONSE_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_noting_code)
        except ClientDisconnect:
            pass
        except Exception as error:
            fault = InternalError(secrets.token_hex(8))
            log.error("http_request_failed", error_id=fault.error_id, exc_info=error)
            if code:  # The response has begun, so the connection is closed.
                raise
            response = self._refuse(scope, RequestError(ErrorKind.FAULT, str(fault)))
            await response(scope, receive, send_noting_code)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            seconds = time.monotonic() - started
            REQUESTS.labels(route, method, code).inc()
            SECONDS.labels(route).observe(seconds)
            state = scope.get("state", {})
            known = {name: state[name] for name in ("caller", "request_id") if state.get(name)}
            (log.debug if is_probe else log.info)(
                "http_request",
                route=route,
                method=method,
                code=code or "gone",
                seconds=round(seconds, 4),
                **known,
            )
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.route": route, "http.response.status_code": code})
            end(span, str(code) if code >= 500 else "")


class RequestLimits:
    """Counts every request but probes to its tenant or its peer, and rejects it if they have no
    more room. Gives it a HeldBody as `request.state.body`.

    The tenant is that of the key in the headers. Without one, the request counts to its peer until
    its body shows a valid key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        connections: Connections,
        callers: Callers,
        max_body_bytes: int,
        refuse: Refuse,
    ) -> None:
        self._app = app
        self._connections = connections
        self.callers = callers
        self.tenant_bytes = Budget("http body bytes", max_body_bytes, leaves_free=True)
        self.peer_bytes = Budget("http body bytes without a key", PEER_BYTES, leaves_free=True)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        peer = peer_of((scope.get("client") or ("",))[0])
        # A server without sockets, as in tests, has no connections.
        connection = scope.get(SCOPE_KEY) or self._connections.open(peer, lambda: None)
        if connection is None:
            await self._reject(scope, receive, send)
            return
        body = HeldBody(self, connection, peer)
        scope.setdefault("state", {})["body"] = body
        try:
            body.know(await self.callers.tenant(header_key(Headers(scope=scope))))
        except RequestError:
            await self._reject(scope, receive, send)
        else:
            await self._app(scope, receive, send)
        finally:
            body.release()
            if SCOPE_KEY not in scope:
                self._connections.close(connection)

    def claim(self, connection: Connection, owner: str, *, has_key: bool) -> None:
        """Counts the connection to the owner. Raises RequestError if the owner has no more room."""
        if not self._connections.claim(connection, owner, has_key=has_key):
            raise RequestError(ErrorKind.UNAVAILABLE, _NO_ROOM, retry_seconds=1)

    async def _reject(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestError(ErrorKind.UNAVAILABLE, _NO_ROOM, retry_seconds=1)
        response = self._refuse(scope, error)
        await response(scope, receive, send)


class HeldBody:
    """The bytes of one request's body, which count to the tenant of its key or to its peer."""

    def __init__(self, limits: RequestLimits, connection: Connection, peer: str) -> None:
        self._limits = limits
        self._connection = connection
        self._peer = peer
        self._tenant = ""
        self._search = KeySearch()
        self._share: Share | None = None

    def know(self, tenant: str) -> None:
        """Counts the request to the tenant; "" counts it to its peer.

        Raises:
            RequestError: The tenant or the peer has no more room.
        """
        self._tenant = tenant
        owner = f"tenant {tenant}" if tenant else self._peer
        self._limits.claim(self._connection, owner, has_key=bool(tenant))

    async def count(self, body: bytearray, announced: int) -> None:
        """Counts the part of the body that has arrived, and looks for a key in it.

        Args:
            announced: The size of the whole body, or 0 if it is not known.

        Raises:
            RequestError: The tenant or the peer has no more room.
        """
        if not self._tenant:
            for key in self._search.candidates(body):
                if tenant := await self._limits.callers.tenant(key):
                    self.release()
                    self.know(tenant)
                    break
        # A key at the beginning is found, whatever the peer holds.
        size = max(len(body), announced) if self._tenant else max(0, len(body) - UNCOUNTED_BYTES)
        try:
            self._grow(size)
        except ServerBusyError as error:
            seconds = math.ceil(error.retry_seconds or 1)
            raise RequestError(ErrorKind.UNAVAILABLE, str(error), retry_seconds=seconds) from None

    def _grow(self, size: int) -> None:
        if self._share:
            self._share.resize(max(size, self._share.amount))
        elif self._tenant:
            self._share = self._limits.tenant_bytes.try_take(self._tenant, size)
        elif size:
            self._share = self._limits.peer_bytes.try_take(self._peer, size)

    def release(self) -> None:
        """Stops counting the body. Call it once no part of the body is in memory; a second call has
        no effect.
        """
        if self._share:
            self._share.release()
            self._share = None
