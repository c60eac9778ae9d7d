"""Section 10 of the contract: a tenant's S3 details, the same answers in both dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from img2img.v1 import service_pb2
from img2img_server.domain.params import Violation
from img2img_server.domain.storage import REALTIME, validate_deploy_type
from img2img_server.gateway.incoming import find_key, read_json
from img2img_server.gateway.kinds import BOOLEAN
from img2img_server.gateway.refusals import RefusedError
from img2img_server.gateway.upstream import Upstream

UPDATED = "S3 details updated successfully"
RESET = "S3 details reset successfully"
FIELDS = tuple(field.name for field in service_pb2.StorageSettings.DESCRIPTOR.fields)
# Sent in place of a value that is no string: the api refuses it after it has checked the key and
# its right, and the complaint is put into our own words.
_NO_STRING = "\x00"


class Storage:
    """Answers update_s3 and reset_s3."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def update(self, request: Request) -> JSONResponse:
        """POST update_s3: replaces all details."""
        body = await read_json(request)
        key = find_key(request, body)
        sent = service_pb2.StorageSettings(**{name: _text(body, name) for name in FIELDS})
        wanted, wrong = _check(body)
        if wrong:
            sent.deploy_type = _NO_STRING  # whatever else is right, nothing is stored
        request_ = service_pb2.UpdateStorageSettingsRequest(settings=sent, check_connection=wanted)
        try:
            told = await self._upstream.update_storage(key, request_)
        except RefusedError as refused:
            raise _reworded(refused, body, wrong) from None
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
        try:
            told = await self._upstream.reset_storage(key, _text(body, "deploy_type"))
        except RefusedError as refused:
            raise _reworded(refused, body) from None
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
        return False, [Violation("check_connection", f"check_connection {BOOLEAN.complaint}")]


def _text(body: Mapping[str, Any], name: str) -> str:
    """Null equals absent; what gRPC cannot carry is no string either."""
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or (not value.isascii() and not _is_text(value)):
        return _NO_STRING
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _reworded(
    refused: RefusedError, body: Mapping[str, Any], more: Sequence[Violation] = ()
) -> RefusedError:
    if not refused.violations:
        return refused
    told = refused.violations
    if more and not validate_deploy_type(_text(body, "deploy_type") or REALTIME):
        told = [violation for violation in told if violation.field != "deploy_type"]
    violations = [
        Violation(violation.field, f"{violation.field} must be a string")
        if _text(body, violation.field) == _NO_STRING
        else violation
        for violation in told
    ]
    return RefusedError(refused.case, violations=[*violations, *more])
