"""The playground: a page at / where a developer tries the service. Files in static/.

It needs no build and nothing from elsewhere, and it runs under a policy that allows neither inline
scripts nor other hosts. It calls the same addresses as everybody else.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from img2img_server.gateway.index import RootRoute
from img2img_server.settings import DEV_KEY, Settings

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cache-Control": "no-cache",  # a new version is seen at once
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _PageRoute(RootRoute):
    """Serves requests that accept HTML; all others go to the next route of the path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and "text/html" in Headers(scope=scope).get("accept", ""):
            return super().matches(scope)
        return Match.NONE, {}


class _Assets(StaticFiles):
    """The page's own files, with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def add_playground(app: FastAPI, settings: Settings) -> None:
    """Adds the page, unless the settings turn it off."""
    if not settings.playground:
        return
    with as_file(files("img2img_server.gateway.playground") / "static") as folder:
        page = (folder / "index.html").read_text(encoding="utf-8")
        assets = _Assets(directory=folder / "assets")

    async def playground(_: Request) -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS | {"Vary": "Accept"})

    app.router.routes.append(_PageRoute("/", playground))

    @app.get("/playground/settings.json", include_in_schema=False)
    async def told(_: Request) -> JSONResponse:
        # Only the key that everybody knows, and only where it works.
        opened = settings.has_open_dev_key
        known = {
            "api_key": DEV_KEY if opened else "",
            "grpc_address": settings.api_address if opened else "",
        }
        return JSONResponse(known, headers=_HEADERS | {"Cache-Control": "no-store"})

    app.mount("/playground", assets)
