"""Keeps responses out of caches: whatever depends on an API key belongs to one caller."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WITH_KEY = ("/api/", "/v1/")


class NoStore:
    """Adds `Cache-Control: no-store` to every response of the paths that take a key.

    Errors have it, too: a cached 401 would outlast the correction of a key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_WITH_KEY):
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Cache-Control"] = "no-store"
            await send(message)

        await self._app(scope, receive, sending)
