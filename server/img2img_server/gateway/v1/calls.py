"""Methods of the gRPC service over HTTP, for what the contract has no words for: live previews, a
model, a scheduler, cancelling.

    GET  /v1/capabilities       GetCapabilities
    POST /v1/jobs               CreateJob: answers at once; the events tell the rest
    POST /v1/jobs/{id}:cancel   CancelJob

BodyBudget and answers are the methods' own messages, see protojson.py.
"""

from __future__ import annotations

import re

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from img2img.v1 import service_pb2
from img2img_server.gateway.http.http_request import find_key, link_base, read_json
from img2img_server.gateway.modelslab import fields
from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.upstream import Upstream
from img2img_server.gateway.v1 import protojson
from img2img_server.settings import Settings

_ID = re.compile(r"[0-9]{1,12}", re.ASCII)


class Calls:
    """Answers these calls. The key comes in a header, or in a body's field `key`."""

    def __init__(self, settings: Settings, upstream: Upstream) -> None:
        self._settings = settings
        self._upstream = upstream

    async def capabilities(self, request: Request) -> Response:
        """GET capabilities."""
        return _json(await self._upstream.capabilities(find_key(request, {})))

    async def create(self, request: Request) -> Response:
        """POST jobs: a CreateJobRequest, all violations told at once."""
        body = await read_json(request)
        key = find_key(request, body)
        create_request = service_pb2.CreateJobRequest()
        try:
            protojson.fill(create_request, {name: body[name] for name in body if name != "key"})
        except RequestError:
            del body
            await self._upstream.caller(key)  # a wrong key is told before wrong fields
            raise
        del body
        base = link_base(request, self._settings.public_base_url)
        try:
            job = await self._upstream.create(
                key, create_request.spec, base, create_request.request_id
            )
        except RequestError as refused:
            if refused.case is not ErrorKind.FIELDS:
                raise
            violations = fields.in_table_order(refused.violations)
            reason = refused.reason
            raise RequestError(ErrorKind.FIELDS, reason=reason, violations=violations) from None
        return _json(service_pb2.CreateJobResponse(job=job))

    async def cancel(self, request: Request, job_id: str) -> Response:
        """POST jobs/{id}:cancel."""
        key = find_key(request, await read_json(request))
        if not _ID.fullmatch(job_id):
            await self._upstream.caller(key)
            raise RequestError(ErrorKind.UNKNOWN_JOB)
        job = await self._upstream.cancel(key, int(job_id))
        return _json(service_pb2.CancelJobResponse(job=job))


def _json(message: Message) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(protojson.dump(message), media_type="application/json", headers=headers)
