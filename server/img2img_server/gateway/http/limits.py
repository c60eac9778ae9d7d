"""Bounds what one gateway holds at a time: open requests, and bytes of their bodies.

Both limits count all callers together, because a request is held before its key is known. Limits of
one peer belong here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError

PROBES = ("/healthz", "/readyz")
Refuse: TypeAlias = Callable[[RequestError], Response]


class RequestLimits:
    """Rejects requests beyond `max_requests`, probes excepted. Gives every other request a HeldBody
    as `request.state.body`, of which all together hold at most `max_body_bytes`."""

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
        """Stops counting the body, once nothing of it is kept. May be called again."""
        self._limits.free_body_bytes += self._size
        self._size = 0
