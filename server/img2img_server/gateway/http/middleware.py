"""What every HTTP request passes on its way in: path, bound, log line, metrics; see browsers.py."""

from __future__ import annotations

import re
import secrets
import time

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from prometheus_client import Counter, Histogram
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from img2img_server.gateway.http.body_budget import Body, BodyBudget
from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.modelslab.response_formats import ResponseFormat
from img2img_server.tracing import end, enter, extracted

REQUESTS = Counter("img2img_http_requests_total", "Answered requests.", ["route", "method", "code"])
SECONDS = Histogram(
    "img2img_http_request_seconds",
    "Time until the answer was sent completely.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_KNOWN_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
_PROBES = ("/healthz", "/readyz")  # asked every few seconds
log = structlog.get_logger()


class NormalizePath:
    """Doubled slashes and one at the end are tolerated, in place: a redirect would turn a POST
    into a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = re.sub("/{2,}", "/", scope["path"])
            scope = {**scope, "path": path.removesuffix("/") or "/"}
        await self._app(scope, receive, send)


class ConcurrencyLimit:
    """Refuses what comes beyond `most` open requests, probes excepted, and counts the bodies that
    they hold, see incoming.py."""

    def __init__(
        self, app: ASGIApp, most: int, bodies: BodyBudget, dialect: ResponseFormat
    ) -> None:
        self._app = app
        self._most = most
        self._bodies = bodies
        self._open = 0
        self._full = dialect.refused(RequestError(ErrorKind.UNAVAILABLE, retry_seconds=1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        if self._open >= self._most:
            response = JSONResponse(self._full.body, self._full.status, self._full.headers)
            await response(scope, receive, send)
            return
        body = scope.setdefault("state", {})["body"] = Body(self._bodies)
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            body.forget()


class AccessLog:
    """One log line and one count a request; a fault of ours becomes an answer.

    The line has the route's template, never the path, the query or a header: keys end up there.
    """

    def __init__(self, app: ASGIApp, dialect: ResponseFormat) -> None:
        self._app = app
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = 0
        started = time.monotonic()
        fields = (
            (name.decode("latin-1"), text.decode("latin-1")) for name, text in scope["headers"]
        )
        span: Span = trace.INVALID_SPAN
        if scope["path"] not in _PROBES:
            span = enter("http request", extracted(fields), SpanKind.SERVER)

        async def send_noting_code(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_code)
        except ClientDisconnect:
            pass
        except Exception as error:
            log.error("http request broke", error_id=secrets.token_hex(8), exc_info=error)
            if code:  # too late to answer: the connection is closed
                raise
            answer = self._dialect.refused(RequestError(ErrorKind.FAULT))
            response = JSONResponse(answer.body, answer.status, answer.headers)
            await response(scope, receive, send_noting_code)
        finally:
            self._record(scope, code, time.monotonic() - started, span)

    def _record(self, scope: Scope, code: int, seconds: float, span: Span) -> None:
        path = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _KNOWN_METHODS else "other"
        REQUESTS.labels(path, method, code).inc()
        SECONDS.labels(path).observe(seconds)
        caller = scope.get("state", {}).get("caller", "")
        write = log.debug if path in _PROBES else log.info
        write(
            "http request",
            route=path,
            method=method,
            code=code or "gone",
            seconds=round(seconds, 4),
            **({"caller": caller} if caller else {}),
        )
        span.update_name(f"{method} {path}")
        span.set_attributes({"http.route": path, "http.response.status_code": code})
        end(span, str(code) if code >= 500 else "")
