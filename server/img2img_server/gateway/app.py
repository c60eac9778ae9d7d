"""The gateway as an ASGI application: the routes of section 2 of the contract, and ours."""

from __future__ import annotations

import asyncio

import grpc
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from img2img_server import __version__
from img2img_server.gateway.docs import add_docs
from img2img_server.gateway.http.cors import Cors
from img2img_server.gateway.http.files import Files, is_file_path, missing
from img2img_server.gateway.http.limits import Refuse, RequestLimits
from img2img_server.gateway.http.middleware import AccessLog, NormalizePath
from img2img_server.gateway.modelslab.endpoints import ENTERPRISE, V6, V6_IMAGES, Endpoints, respond
from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.modelslab.management import Management
from img2img_server.gateway.modelslab.response_formats import (
    Current,
    Legacy,
    Plain,
    ResponseFormat,
)
from img2img_server.gateway.modelslab.storage import Storage
from img2img_server.gateway.openapi import document
from img2img_server.gateway.playground.page import add_root
from img2img_server.gateway.readiness import Readiness
from img2img_server.gateway.upstream import Upstream
from img2img_server.gateway.v1.calls import Calls
from img2img_server.gateway.v1.events import EventStreams
from img2img_server.settings import Settings
from img2img_server.storage.interface import BlobStore


def create_app(
    settings: Settings,
    channel: grpc.aio.Channel,
    blobs: BlobStore,
    stop: asyncio.Event | None = None,
    readiness: Readiness | None = None,
) -> FastAPI:
    """The gateway in front of the api behind `channel` and the files in `blobs`.

    Args:
        stop: once set, /readyz says so, waiting POSTs answer `processing`, event streams end.
        readiness: what /readyz tells; by default asked of `channel` and `blobs`.
    """
    stop = stop or asyncio.Event()
    dialect: ResponseFormat = Legacy() if settings.legacy else Current()
    upstream, files = Upstream(channel), Files(blobs)
    app = FastAPI(
        title="img2img",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # `AccessLog` makes the span and the metrics of a request: FastAPI's own would come twice.
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    app.openapi = lambda: document(settings)  # type: ignore[method-assign]

    def refuse(error: RequestError) -> JSONResponse:
        return respond(dialect.refused(error))

    v1_dialect = dialect if settings.legacy else Plain()

    def refuse_v1(error: RequestError) -> JSONResponse:
        return respond(v1_dialect.refused(error))

    # A request passes the last one first.
    app.add_middleware(
        RequestLimits,
        max_requests=settings.max_http_requests,
        max_body_bytes=settings.max_http_body_bytes,
        refuse=refuse,
    )
    app.add_middleware(AccessLog, refuse=refuse)
    app.add_middleware(Cors, settings=settings, refuse=refuse)
    app.add_middleware(NormalizePath)
    _add_refusals(app, refuse, refuse_v1)
    _add_contract(app, Endpoints(settings, upstream, files, dialect, stop))
    _add_management(app, Management(upstream), Storage(upstream))
    _add_files(app, files)
    _add_calls(app, Calls(settings, upstream))
    _add_events(app, EventStreams(upstream, stop))
    _add_probes(app, readiness or Readiness(channel, blobs, stop))
    add_docs(app, settings)
    add_root(app, settings)
    return app


def _add_refusals(app: FastAPI, refuse: Refuse, refuse_v1: Refuse) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, why: Exception) -> Response:
        assert isinstance(why, RequestError)
        is_v1 = request.scope["path"].startswith("/v1/")
        return (refuse_v1 if is_v1 else refuse)(why)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, why: Exception) -> Response:
        assert isinstance(why, HTTPException)
        if why.status_code != ErrorKind.WRONG_METHOD.status:
            if is_file_path(request.scope["path"]):  # a line feed in it: the route does not match
                return missing()
            return refuse(RequestError(ErrorKind.NO_ROUTE))
        allowed = {"Allow": f"{(why.headers or {}).get('Allow', 'GET')}, OPTIONS"}
        return refuse(RequestError(ErrorKind.WRONG_METHOD, headers=allowed))


def _add_contract(app: FastAPI, endpoints: Endpoints) -> None:
    @app.post(f"{ENTERPRISE}/img2img")
    async def create_enterprise(request: Request) -> Response:
        return await endpoints.create(request, ENTERPRISE)

    @app.post(f"{V6}/img2img")
    async def create_v6(request: Request) -> Response:
        return await endpoints.create(request, V6)

    @app.api_route(f"{ENTERPRISE}/fetch/{{job_id}}", methods=["GET", "POST"])
    async def fetch_enterprise(request: Request, job_id: str) -> Response:
        return await endpoints.fetch(request, ENTERPRISE, job_id)

    @app.api_route(f"{V6}/fetch/{{job_id}}", methods=["GET", "POST"])
    async def fetch_v6(request: Request, job_id: str) -> Response:
        return await endpoints.fetch(request, V6, job_id)

    @app.api_route(f"{V6_IMAGES}/fetch/{{job_id}}", methods=["GET", "POST"])
    async def fetch_v6_images(request: Request, job_id: str) -> Response:
        return await endpoints.fetch(request, V6_IMAGES, job_id)

    @app.post("/api/v1/enterprise/fetch")
    async def fetch_enterprise_by_body(request: Request) -> Response:
        return await endpoints.fetch_by_body(request, ENTERPRISE)

    @app.post(f"{V6_IMAGES}/fetch")
    async def fetch_v6_by_body(request: Request) -> Response:
        return await endpoints.fetch_by_body(request, V6_IMAGES)


def _add_management(app: FastAPI, management: Management, storage: Storage) -> None:
    routes = {
        f"{ENTERPRISE}/system_details": management.system_details,
        f"{ENTERPRISE}/restart_server": management.restart_server,
        f"{ENTERPRISE}/update_server": management.update_server,
        f"{ENTERPRISE}/update": management.update_server,
        f"{ENTERPRISE}/clear_cache": management.clear_cache,
        f"{ENTERPRISE}/clear_queue": management.clear_queue,
        "/api/v1/enterprise/update_s3": storage.update,
        "/api/v1/enterprise/reset_s3": storage.reset,
    }
    for path, endpoint in routes.items():
        app.add_api_route(path, endpoint, methods=["POST"])


def _add_files(app: FastAPI, files: Files) -> None:
    # The rest of the path may hold anything: below these folders every miss is plain text.
    @app.api_route("/generations/{name:path}", methods=["GET", "HEAD"])
    @app.api_route("/temp/{name:path}", methods=["GET", "HEAD"])
    async def file(request: Request) -> Response:
        return await files.serve(request)


def _add_calls(app: FastAPI, calls: Calls) -> None:
    app.add_api_route("/v1/capabilities", calls.capabilities, methods=["GET"])
    app.add_api_route("/v1/jobs", calls.create, methods=["POST"])

    @app.post("/v1/jobs/{job_id}:cancel")
    async def cancel(request: Request, job_id: str) -> Response:
        return await calls.cancel(request, job_id)


def _add_events(app: FastAPI, streams: EventStreams) -> None:
    @app.get("/v1/jobs/{job_id}/events")
    async def events(request: Request, job_id: str) -> Response:
        return await streams.serve(request, job_id)


def _add_probes(app: FastAPI, readiness: Readiness) -> None:
    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def alive() -> Response:
        return JSONResponse({"status": "alive"})

    @app.api_route("/readyz", methods=["GET", "HEAD"])
    async def ready() -> Response:
        if troubles := await readiness.troubles():
            body = {"status": "not ready", **troubles}
            return JSONResponse(body, 503, {"Cache-Control": "no-store"})
        return JSONResponse({"status": "ready"})
