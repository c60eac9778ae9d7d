"""The index at /: what this is and where to look, as JSON for whoever does not ask for a page."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match, Route
from starlette.types import Scope

from img2img_server import __version__
from img2img_server.settings import Settings

_PATHS = {
    "docs": "/docs",
    "openapi": "/openapi.json",
    "jobs": "/v1/jobs",
    "capabilities": "/v1/capabilities",
    "health": "/healthz",
    "readiness": "/readyz",
}


class RootRoute(Route):
    """A route of GET and HEAD. For other methods there is no such path, as the contract has it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return (match, found) if match is Match.FULL else (Match.NONE, {})


def add_index(app: FastAPI, settings: Settings) -> None:
    """Adds the index; a page at the same path must be added before."""
    base = settings.public_base_url.rstrip("/")
    links = {name: base + path for name, path in _PATHS.items()}

    async def index(_: Request) -> JSONResponse:
        told = {"name": "img2img", "version": __version__, **links}
        return JSONResponse(told, headers={"Vary": "Accept"})

    app.router.routes.append(RootRoute("/", index))
