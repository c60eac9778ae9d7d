"""Middleware of all requests: the path, the log line, metrics, the span, and limits.

The limits count all callers together, because a request is held before its key is known.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import TypeAlias

import structlog
from opentelemetry import trace
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.request_ids import RESPONSE_HEADER
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
Refuse: TypeAlias = Callable[[RequestError], Response]
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
            log.error("http_request_failed", error_id=secrets.token_hex(8), exc_info=error)
            if code:  # The response has begun, so the connection is closed.
                raise
            response = self._refuse(RequestError(ErrorKind.FAULT))
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
    """Rejects requests beyond `max_requests`, probes excepted. Gives every other request a HeldBody
    as `request.state.body`. All of these together hold at most `max_body_bytes`."""

    def __init__(
        self, app: ASGIApp, *, max_requests: int, max_body_bytes: int, refuse: Refuse
    ) -> None:
        self._app = app
        self._free_requests = max_requests
        self.free_body_bytes = max_body_bytes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._free_requests == 0:
            response = self._refuse(RequestError(ErrorKind.UNAVAILABLE, retry_seconds=1))
            await response(scope, receive, send)
            return
        body = scope.setdefault("state", {})["body"] = HeldBody(self)
        self._free_requests -= 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._free_requests += 1
            body.release()


class HeldBody:
    """The bytes of one request's body that count against the limit."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._size = 0

    def reserve(self, size: int) -> bool:
        """Counts `size` more bytes. Returns False when they exceed the limit."""
        if size > self._limits.free_body_bytes:
            return False
        self._limits.free_body_bytes -= size
        self._size += size
        return True

    def release(self) -> None:
        """Stops counting the body. Call it once no part of the body is in memory; a second call has
        no effect."""
        self._limits.free_body_bytes += self._size
        self._size = 0
