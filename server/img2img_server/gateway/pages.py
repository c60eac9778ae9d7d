"""Serves the pages at / and /docs, and the JSON index at / for clients that do not accept HTML.

The playground, in playground/static/, is a page on which a developer tries the service. It needs no
build step and no other host, and its Content-Security-Policy allows no inline scripts. It calls the
same paths as every client.
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from img2img_server import __version__
from img2img_server.settings import DEV_KEY, Settings

_STATIC = Path(__file__).with_name("playground") / "static"
_DOCS = Path(__file__).with_name("docs")
_PATHS = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "jobs": "/v1/jobs",
    "capabilities": "/v1/capabilities",
    "openai": "/v1/models",
    "health": "/healthz",
    "readiness": "/readyz",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:{stored}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    # Browsers revalidate files, so that an upgrade takes effect at once.
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_DOCS_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _RootRoute(Route):
    """Matches GET and HEAD only. Other methods get 404, since / is no path of the HTTP contract."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return (match, child_scope) if match is Match.FULL else (Match.NONE, {})


class _Assets(StaticFiles):
    """The files of the page, with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_page_headers(""))
        return response


def _page_headers(base: str) -> dict[str, str]:
    """Returns the headers of the page, which also shows stored images at the public address."""
    url = urlsplit(base)
    stored = f" {url.scheme}://{url.netloc}" if base else ""
    return {name: value.format(stored=stored) for name, value in _HEADERS.items()}


def add_root(app: FastAPI, settings: Settings) -> None:
    """Adds the index and, if the setting `playground` is on, the playground."""
    base = settings.public_base_url.rstrip("/")
    page_headers = _page_headers(base)
    links = {name: base + path for name, path in _PATHS.items()}
    page = ""

    async def root(request: Request) -> Response:
        headers = {"Vary": "Accept"}
        if page and "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(page, headers=page_headers | headers)
        index = {"name": "img2img", "version": __version__, **links}
        return JSONResponse(index, headers=headers)

    app.router.routes.append(_RootRoute("/", root))
    if not settings.playground:
        return
    page = (_STATIC / "index.html").read_text(encoding="utf-8")

    @app.get("/playground/settings.json", include_in_schema=False)
    async def page_settings(_: Request) -> JSONResponse:
        # The page gets no other key than the development key, and only while that key is accepted.
        works = settings.has_open_dev_key
        values = {
            "api_key": DEV_KEY if works else "",
            "grpc_address": settings.public_grpc_address or (settings.api_address if works else ""),
            "grpc_tls": settings.public_grpc_tls,
        }
        return JSONResponse(values, headers=_page_headers("") | {"Cache-Control": "no-store"})

    app.mount("/playground", _Assets(directory=_STATIC / "assets"))


def add_docs(app: FastAPI, settings: Settings) -> None:
    """Adds Swagger UI from a package, so that it works offline. With the development key, "Try it
    out" is already authorized."""
    key = DEV_KEY if settings.has_open_dev_key else ""
    html = (_DOCS / "index.html").read_text(encoding="utf-8")
    script = (_DOCS / "start.js").read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    async def page(_: Request) -> HTMLResponse:
        return HTMLResponse(html, headers=_DOCS_HEADERS)

    @app.get("/docs/start.js", include_in_schema=False)
    async def start(_: Request) -> Response:
        return Response(f"const KEY = {json.dumps(key)};\n{script}", media_type="text/javascript")

    with as_file(files("fastapi_offline") / "static") as folder:
        app.mount("/docs/assets", StaticFiles(directory=folder))
