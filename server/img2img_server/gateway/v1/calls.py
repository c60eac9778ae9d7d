"""Methods of the gRPC service over HTTP, for what ModelsLab's contract has no words for: live
previews, a model, a scheduler, cancelling.

    GET  /v1/capabilities       GetCapabilities
    POST /v1/jobs               CreateJob: responds at once; the events report the rest
    POST /v1/jobs/{id}:cancel   CancelJob

Bodies are the methods' own messages, see protojson.py.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Path
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from img2img.v1 import service_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.requests import Img2ImgRequest, merge
from img2img_server.gateway.http.http_request import find_key, link_base, read_json
from img2img_server.gateway.openapi import BODY, body, outcomes
from img2img_server.gateway.upstream import Upstream
from img2img_server.gateway.v1 import protojson
from img2img_server.settings import Settings

_ID = re.compile(r"[0-9]{1,12}", re.ASCII)
JobId = Annotated[str, Path(description="The `id` of the job.")]


class Calls:
    """Answers these calls. The key comes in a header, or in a body's field `key`."""

    def __init__(self, settings: Settings, upstream: Upstream) -> None:
        self._settings = settings
        self._upstream = upstream

    def router(self) -> APIRouter:
        """Returns the routes."""
        router = APIRouter(prefix="/v1", tags=["jobs"])
        found = outcomes("GetCapabilitiesResponse")
        router.get("/capabilities", responses=found)(self.capabilities)
        creating = (ErrorKind.FORBIDDEN, ErrorKind.REQUEST_ID_REUSED, ErrorKind.RATE_LIMIT)
        found = outcomes("CreateJobResponse", errors=[*BODY, ErrorKind.FIELDS, *creating])
        extra = body("CreateJobRequest")
        router.post("/jobs", responses=found, openapi_extra=extra)(self.create)
        failing = [*BODY, ErrorKind.UNKNOWN_JOB, ErrorKind.JOB_ENDED]
        found = outcomes("CancelJobResponse", errors=failing)
        router.post("/jobs/{job_id}:cancel", responses=found)(self.cancel)
        return router

    async def capabilities(self, request: Request) -> Response:
        """The models being served, the default one first, and the limits. The same as
        GetCapabilities over gRPC."""
        return _json(await self._upstream.capabilities(find_key(request, {})))

    async def create(self, request: Request) -> Response:
        """Queues a job and responds at once. The same as CreateJob over gRPC."""
        sent = await read_json(request)
        key = find_key(request, sent)
        sent.pop("key", None)
        create_request = service_pb2.CreateJobRequest()
        violations = protojson.fill(create_request, sent)
        del sent
        if violations:
            create_request.Clear()
            await self._upstream.caller(key)  # a wrong key is reported before wrong fields
            raise RequestError(ErrorKind.FIELDS, violations=merge(Img2ImgRequest, violations))
        base = link_base(request, self._settings.public_base_url)
        try:
            job = await self._upstream.create(
                key, create_request.spec, base, create_request.request_id
            )
        except RequestError as error:
            error.violations = merge(Img2ImgRequest, error.violations)
            raise
        return _json(service_pb2.CreateJobResponse(job=job))

    async def cancel(self, request: Request, job_id: JobId) -> Response:
        """Ends a queued job at once and a running one at its next step. The same as CancelJob over
        gRPC."""
        key = find_key(request, await read_json(request))
        if not _ID.fullmatch(job_id):
            await self._upstream.caller(key)
            raise RequestError(ErrorKind.UNKNOWN_JOB)
        job = await self._upstream.cancel(key, int(job_id))
        return _json(service_pb2.CancelJobResponse(job=job))


def _json(message: Message) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(protojson.dump(message), media_type="application/json", headers=headers)
