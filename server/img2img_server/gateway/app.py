"""The gateway as an ASGI application: one router for each API, files and probes."""

from __future__ import annotations

import asyncio
from functools import cache, partial
from typing import Any

import grpc
from fastapi import APIRouter, FastAPI
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from img2img_server import __version__
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.response_formats import (
    Current,
    ErrorFormat,
    Legacy,
)
from img2img_server.gateway.http.caching import NoStore
from img2img_server.gateway.http.callers import Callers
from img2img_server.gateway.http.connections import Connections
from img2img_server.gateway.http.cors import Cors
from img2img_server.gateway.http.files import Files, is_file_path, missing
from img2img_server.gateway.http.middleware import AccessLog, NormalizePath, RequestLimits
from img2img_server.gateway.modelslab import endpoints as modelslab
from img2img_server.gateway.modelslab.management import Management
from img2img_server.gateway.openai import endpoints as openai
from img2img_server.gateway.openai import errors as openai_errors
from img2img_server.gateway.openapi import document
from img2img_server.gateway.pages import add_docs, add_root
from img2img_server.gateway.readiness import Readiness
from img2img_server.gateway.upstream import Upstream
from img2img_server.gateway.v1 import endpoints as v1
from img2img_server.gateway.v1 import errors as v1_errors
from img2img_server.gateway.v1 import uploads
from img2img_server.settings import Settings
from img2img_server.storage.interface import BlobStore

_STATUS = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
_NO_ROUTE = "There is no such path: GET / lists the paths, and /docs describes them"
_PROBE: dict[str, Any] = {"content": {"application/json": {"schema": _STATUS}}}


def create_app(
    settings: Settings,
    channel: grpc.aio.Channel,
    blobs: BlobStore,
    stop: asyncio.Event | None = None,
    readiness: Readiness | None = None,
) -> FastAPI:
    """Creates the gateway in front of the api at `channel` and of the files in `blobs`.

    Args:
        stop: Once it is set, /readyz reports the stop, waiting requests get `processing`, and event
            streams end.
        readiness: The checks of /readyz. Default: checks of `channel` and `blobs`.
    """
    stop = stop or asyncio.Event()
    response_format = Legacy() if settings.legacy else Current()
    v1_format = v1_errors.ErrorFormat()
    openai_format = openai_errors.ErrorFormat()
    upstream, files = Upstream(channel), Files(blobs)
    app = FastAPI(
        title="img2img",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # `AccessLog` makes the span and the metrics of a request, so FastAPI's instrumentation is
        # off.
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    proxies = settings.trusted_proxy_networks
    app.state.connections = Connections(settings.max_http_requests, proxies)
    app.openapi = cache(partial(document, app, settings))  # type: ignore[method-assign]

    def refuse(scope: Scope, error: RequestError) -> Response:
        form: ErrorFormat = response_format
        if openai_errors.serves(scope["path"]):
            form = openai_format
        elif f"{scope['path']}/".startswith("/v1/"):
            form = v1_format
        return JSONResponse(*form.error(error))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return refuse(request.scope, error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"]
        if error.status_code == ErrorKind.WRONG_METHOD.status:
            methods = [m for r in iter_route_contexts(app.routes) for m in _methods(r, path)]
            allow = {"Allow": ", ".join(dict.fromkeys([*methods, "OPTIONS"]))}
            message = f"This path takes {' or '.join(dict.fromkeys(methods))}"
            wrong = RequestError(ErrorKind.WRONG_METHOD, message, headers=allow)
            return refuse(request.scope, wrong)
        if is_file_path(path):  # The path parameter does not match a line feed.
            return missing()
        return refuse(request.scope, RequestError(ErrorKind.NO_ROUTE, _NO_ROUTE))

    # The middleware that is added last runs first.
    app.add_middleware(
        RequestLimits,
        connections=app.state.connections,
        callers=Callers(upstream.tenant),
        max_body_bytes=settings.max_http_body_bytes,
        refuse=refuse,
    )
    app.add_middleware(AccessLog, refuse=refuse)
    app.add_middleware(Cors, settings=settings, refuse=refuse)
    app.add_middleware(NoStore)
    app.add_middleware(NormalizePath)
    for router in (
        modelslab.Endpoints(settings, upstream, files, response_format, stop).router(),
        Management(upstream).router(),
        _files(files),
        v1.Endpoints(settings, upstream, stop).router(),
        uploads.Endpoints(upstream).router(),
        openai.Endpoints(settings, upstream, files, stop).router(),
        _probes(readiness or Readiness(channel, blobs, stop)),
    ):
        app.include_router(router)
    add_docs(app, settings)
    add_root(app, settings)
    return app


def _methods(route: RouteContext, path: str) -> set[str]:
    return route.methods if route.methods and route.path_regex.match(path) else set()


def _files(files: Files) -> APIRouter:
    router = APIRouter(tags=["files"])
    text = {"text/plain": {"schema": {"type": "string"}}}
    image = {"image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}}}
    responses: dict[int | str, dict[str, Any]] = {
        404: {"description": "No such file, or not stored yet.", "content": text},
        503: {"description": "The bucket cannot be read.", "content": text},
    }

    # The name may contain slashes, so that every 404 below these folders is plain text.
    for folder in ("generations", "temp"):
        path = f"/{folder}/{{name:path}}"
        router.head(path, response_class=Response, responses=responses)(files.serve)
        found: dict[int | str, dict[str, Any]] = {200: {"content": image | text}}
        router.get(path, response_class=Response, responses=found | responses)(files.serve)
    return router


def _probes(readiness: Readiness) -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", responses={200: _PROBE})
    async def alive() -> Response:
        """Reports that the process runs."""
        return JSONResponse({"status": "alive"})

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={200: _PROBE, 503: _PROBE})
    async def ready() -> Response:
        """Reports whether the api serves, the bucket can be read and a model was announced."""
        if troubles := await readiness.troubles():
            body = {"status": "not ready", **troubles}
            return JSONResponse(body, 503, {"Cache-Control": "no-store"})
        return JSONResponse({"status": "ready"})

    return router
