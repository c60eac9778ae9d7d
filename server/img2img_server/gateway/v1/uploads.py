"""The routes of uploads under /v1: init images that are stored once and named by many jobs.

POST   /v1/uploads                CreateUpload
GET    /v1/uploads/{id}           GetUpload
POST   /v1/uploads/{id}:complete  CompleteUpload
DELETE /v1/uploads/{id}           DeleteUpload
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from img2img.v1 import service_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.requests import init_image
from img2img_server.domain.violations import Reason, Violation, invalid_type
from img2img_server.gateway.http import forms
from img2img_server.gateway.http.http_request import (
    find_key,
    media_type_of,
    read_body,
    read_json,
)
from img2img_server.gateway.openapi import BODY, outcomes
from img2img_server.gateway.upstream import Upstream
from img2img_server.gateway.v1 import protojson, unknown_fields
from img2img_server.gateway.v1.errors import ErrorFormat, V1Error
from img2img_server.gateway.v1.job_requests import IMAGE_TYPES, TAKES

UPLOAD_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/CreateUploadRequest"}},
            "multipart/form-data": {"schema": {"$ref": "#/components/schemas/CreateUploadForm"}},
            "image/*": {"schema": {"contentMediaType": "application/octet-stream"}},
        },
    }
}
_GONE: Final = (ErrorKind.UNKNOWN_UPLOAD, ErrorKind.UPLOAD_EXPIRED)
_outcomes = partial(outcomes, form=ErrorFormat(), schema=V1Error.__name__)
UploadId = Annotated[str, Path(description="The id in the `name` of the upload.")]


class Endpoints:
    """Answers these calls."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["jobs"])
        failing = [*BODY, ErrorKind.FIELDS, ErrorKind.RATE_LIMIT]
        found = _outcomes("CreateUploadResponse", errors=failing)
        router.post("/uploads", responses=found, openapi_extra=UPLOAD_BODY)(self.create_upload)
        found = _outcomes("GetUploadResponse", errors=_GONE)
        router.get("/uploads/{upload_id:job_id}", responses=found)(self.get_upload)
        failing = [*BODY, *_GONE, ErrorKind.FIELDS, ErrorKind.UPLOAD_INCOMPLETE]
        failing.append(ErrorKind.RATE_LIMIT)
        found = _outcomes("CompleteUploadResponse", errors=failing)
        router.post("/uploads/{upload_id}:complete", responses=found)(self.complete_upload)
        found = _outcomes("DeleteUploadResponse", errors=[ErrorKind.UNKNOWN_UPLOAD])
        router.delete("/uploads/{upload_id:job_id}", responses=found)(self.delete_upload)
        return router

    async def create_upload(self, request: Request) -> Response:
        """Stores an init image, as CreateUpload does over gRPC. The body is the image, a form with
        the file `image`, or JSON: with `image` in base64, or with `sha256` and `size_bytes` for a
        file that is sent to `put_url` afterwards."""
        wanted, key, violations = await _read(request)
        if violations:
            await self._upstream.caller(key)  # A wrong key is reported before wrong fields.
            raise RequestError(ErrorKind.FIELDS, violations=violations)
        return protojson.response(await self._upstream.create_upload(key, wanted))

    async def get_upload(self, request: Request, upload_id: UploadId) -> Response:
        """Returns an upload, as GetUpload does over gRPC."""
        key = find_key(request, {})
        await unknown_fields.refuse(request, partial(self._upstream.caller, key))
        return protojson.response(await self._upstream.upload(key, upload_id))

    async def complete_upload(self, request: Request, upload_id: UploadId) -> Response:
        """Checks the file that was sent to `put_url`, as CompleteUpload does over gRPC."""
        key = await unknown_fields.key_of_body(request, self._upstream.caller)
        return protojson.response(await self._upstream.complete_upload(key, upload_id))

    async def delete_upload(self, request: Request, upload_id: UploadId) -> Response:
        """Deletes an upload, as DeleteUpload does over gRPC. Accepted jobs keep their image."""
        key = find_key(request, {})
        await unknown_fields.refuse(request, partial(self._upstream.caller, key))
        return protojson.response(await self._upstream.delete_upload(key, upload_id))


async def _read(
    request: Request,
) -> tuple[service_pb2.CreateUploadRequest, str, list[Violation]]:
    """Returns the request of the api, the key, and a violation for each field that is wrong."""
    wanted = service_pb2.CreateUploadRequest()
    sent: dict[str, Any] = {}
    violations: list[Violation] = []
    media_type = media_type_of(request)
    if media_type == forms.MEDIA_TYPE:
        sent, violations = _of_form(wanted, await forms.read_form(request))
    elif media_type.startswith(IMAGE_TYPES):
        wanted.image = bytes(await read_body(request))
        violations = _need_image(wanted)
    else:
        sent = await read_json(request, takes=TAKES, unique=True)
        fields = {name: value for name, value in sent.items() if name != "key"}
        if isinstance(fields.get("image"), str):
            violations = _take_text(wanted, fields.pop("image"))
        violations += protojson.fill(wanted, fields)
    violations += unknown_fields.in_query(request)
    return wanted, find_key(request, sent), violations


def _of_form(
    wanted: service_pb2.CreateUploadRequest, parts: list[forms.Part]
) -> tuple[dict[str, Any], list[Violation]]:
    values: dict[str, Any] = {}
    violations: list[Violation] = []
    while parts:
        part = parts.pop(0)
        if part.name in values:
            violations.append(protojson.sent_twice(part.name))
            continue
        values[part.name] = ""
        if part.name == "image" and part.is_file:
            wanted.image = part.content
            continue
        try:
            values[part.name] = part.text()
        except ValueError:
            is_known = part.name in wanted.DESCRIPTOR.fields_by_name
            wrong = invalid_type(part.name, "text in UTF-8")
            violations.append(wrong if is_known else protojson.unknown(part.name))
    if text := values.pop("image", ""):
        violations += _take_text(wanted, text)
    key = values.pop("key", "")
    violations += protojson.fill(wanted, {name: text for name, text in values.items() if text})
    if not violations:
        violations = _need_image(wanted)
    return {"key": key}, violations


def _take_text(wanted: service_pb2.CreateUploadRequest, text: str) -> list[Violation]:
    """Sets the image from a data URI or base64."""
    try:
        text.encode()
    except ValueError:  # Lone surrogates are no Unicode.
        return [invalid_type("image", "base64 or a data URI")]
    found = init_image(text) if text else None
    if found and found.url:
        return [invalid_type("image", "base64 or a data URI")]
    wanted.image = found.data if found else b""
    return []


def _need_image(wanted: service_pb2.CreateUploadRequest) -> list[Violation]:
    if wanted.image or wanted.sha256 or wanted.size_bytes:
        return []
    return [Violation("image", Reason.REQUIRED, "image is required")]
