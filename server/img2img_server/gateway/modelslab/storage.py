"""Section 10 of the contract: a tenant's S3 details, the same answers in both dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from img2img.v1 import service_pb2
from img2img_server.compat.modelslab.server_types import validate_server_type
from img2img_server.domain.storage import MAX_CHARACTERS, REALTIME
from img2img_server.domain.violations import Violation, invalid_type
from img2img_server.gateway.http.http_request import find_key, read_json
from img2img_server.gateway.modelslab.errors import RequestError
from img2img_server.gateway.modelslab.field_types import BOOLEAN
from img2img_server.gateway.upstream import Upstream

UPDATED = "S3 details updated successfully"
RESET = "S3 details reset successfully"
FIELDS = tuple(field.name for field in service_pb2.StorageSettings.DESCRIPTOR.fields)
# Sent in place of a value that is no string: the api refuses it after it has checked the key and
# its right, and the complaint is put into our own words.
_NO_STRING = "\x00"
# Of a longer value one character too many is sent on, for the api to refuse it all the same.
_MOST_CHARACTERS = MAX_CHARACTERS + 1


class Storage:
    """Answers update_s3 and reset_s3."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def update(self, request: Request) -> JSONResponse:
        """POST update_s3: replaces all details."""
        body = await read_json(request)
        key = find_key(request, body)
        texts = {name: _text(body, name) for name in FIELDS}
        wanted, wrong = _check(body)
        del body
        sent = service_pb2.StorageSettings(**texts)
        if wrong:
            sent.deploy_type = _NO_STRING  # whatever else is right, nothing is stored
        request_ = service_pb2.UpdateStorageSettingsRequest(settings=sent, check_connection=wanted)
        try:
            told = await self._upstream.update_storage(key, request_)
        except RequestError as refused:
            raise _reworded(refused, texts, wrong) from None
        return JSONResponse(
            {
                "status": "success",
                "message": UPDATED,
                "deploy_type": told.settings.deploy_type,
                "public_url": told.settings.public_url,
                "image_directory": told.settings.image_directory,
                "warning": told.warning,
            }
        )

    async def reset(self, request: Request) -> JSONResponse:
        """POST reset_s3: removes them."""
        body = await read_json(request)
        key = find_key(request, body)
        deploy_type = _text(body, "deploy_type")
        del body
        told = await self._upstream.reset_storage(key, deploy_type)
        return JSONResponse(
            {"status": "success", "message": RESET, "deploy_type": told.deploy_type}
        )


def _check(body: Mapping[str, Any]) -> tuple[bool, list[Violation]]:
    """Whether the connection is to be checked first, and what is wrong with how that was said."""
    value = body.get("check_connection")
    if value is None or value == "":
        return False, []
    try:
        return BOOLEAN.read(value), []
    except ValueError:
        return False, [invalid_type("check_connection", BOOLEAN.expected)]


def _text(body: Mapping[str, Any], name: str) -> str:
    """Null equals absent; what gRPC cannot carry is no string either."""
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or (not value.isascii() and not _is_text(value)):
        return _NO_STRING
    return value[:_MOST_CHARACTERS]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _reworded(
    refused: RequestError, texts: Mapping[str, str], more: Sequence[Violation]
) -> RequestError:
    """In words of ours. A deploy_type that is no string is just another wrong one (section 10)."""
    if not refused.violations:
        return refused
    told = refused.violations
    if more and not validate_server_type(texts["deploy_type"] or REALTIME):
        told = [violation for violation in told if violation.field != "deploy_type"]
    violations = [
        invalid_type(violation.field, "a string")
        if violation.field != "deploy_type" and texts.get(violation.field) == _NO_STRING
        else violation
        for violation in told
    ]
    return RequestError(refused.case, reason=refused.reason, violations=[*violations, *more])
