"""ModelsLab's management calls, the same in both modes: docs/http-contract.md#management, #s3."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from img2img.v1 import service_pb2
from img2img_server.compat.modelslab import requests, responses
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.server_types import validate_server_type
from img2img_server.domain.storage import REALTIME, StorageDetails, validate_storage
from img2img_server.errors import PermissionDeniedError
from img2img_server.gateway.http.http_request import find_key, read_json
from img2img_server.gateway.openapi import BODY, body, outcomes
from img2img_server.gateway.upstream import Upstream

Call = Callable[[str], Awaitable[object]]  # a call of the api with the caller's key
_DETAILS = tuple(field.name for field in fields(StorageDetails))


class Management:
    """Answers the management calls. The api checks the permissions of the key."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def router(self) -> APIRouter:
        """Returns the routes."""
        router = APIRouter(prefix="/api/v1/enterprise", tags=["management"])
        upstream = self._upstream
        calls: dict[str, tuple[Call, str]] = {
            "restart_server": (
                upstream.restart,
                "Restarts the workers; running jobs are requeued.",
            ),
            "update_server": (upstream.update, "Reads configuration and model files again."),
            "update": (upstream.update, "Is the name of update_server in the official SDK."),
            "clear_cache": (upstream.clear_cache, "Empties the workers' caches."),
            "clear_queue": (upstream.clear_queue, "Ends the tenant's waiting jobs as failed."),
        }
        for path, endpoint, request, response in (
            *(
                (f"/realtime/{name}", _calling(name, *call), "KeyRequest", "Done")
                for name, call in calls.items()
            ),
            ("/realtime/system_details", self.system_details, "KeyRequest", "SystemDetails"),
            ("/update_s3", self.update_s3, "UpdateS3Request", "StorageUpdated"),
            ("/reset_s3", self.reset_s3, "ResetS3Request", "StorageReset"),
        ):
            found = outcomes(response, errors=[*BODY, ErrorKind.FIELDS, ErrorKind.FORBIDDEN])
            extra = body(request, required=request == "UpdateS3Request")
            name = path.rpartition("/")[2]
            router.post(path, name=name, responses=found, openapi_extra=extra)(endpoint)
        return router

    async def system_details(self, request: Request) -> JSONResponse:
        """Reports jobs, models and the use of the devices."""
        details = await self._upstream.system_details(find_key(request, await read_json(request)))
        return JSONResponse(responses.system_details(details))

    async def update_s3(self, request: Request) -> JSONResponse:
        """Replaces all S3 details of the tenant."""
        key, values = await self._read(request, requests.UpdateS3Request)
        check_connection = values.pop("check_connection", False)
        update = service_pb2.UpdateStorageSettingsRequest(
            settings=service_pb2.StorageSettings(**values), check_connection=check_connection
        )
        response = await self._upstream.update_storage(key, update)
        return JSONResponse(responses.storage_updated(response))

    async def reset_s3(self, request: Request) -> JSONResponse:
        """Removes the S3 details of the tenant."""
        key, values = await self._read(request, requests.ResetS3Request)
        response = await self._upstream.reset_storage(key, values["deploy_type"])
        return JSONResponse(responses.storage_reset(response.deploy_type))

    async def _read(
        self, request: Request, model: type[requests.ResetS3Request]
    ) -> tuple[str, dict[str, Any]]:
        """Returns the key and the values. Reports a wrong key and a missing permission before wrong
        fields."""
        sent = await read_json(request)
        key, parsed = find_key(request, sent), requests.parse(model, sent)
        del sent  # Long texts are freed before the call below.
        values = parsed.values
        broken = validate_server_type(values.setdefault("deploy_type", REALTIME))
        if model is requests.UpdateS3Request:
            broken += validate_storage(StorageDetails(**{n: values.get(n, "") for n in _DETAILS}))
        violations = requests.merge(model, parsed.violations, broken)
        if not violations:
            return key, values
        values.clear()
        caller = await self._upstream.caller(key)
        if "storage" not in caller.permissions:
            raise RequestError(ErrorKind.FORBIDDEN, str(PermissionDeniedError("storage")))
        raise RequestError(ErrorKind.FIELDS, violations=violations)


def _calling(
    name: str, call: Call, description: str
) -> Callable[[Request], Awaitable[JSONResponse]]:
    async def endpoint(request: Request) -> JSONResponse:
        await call(find_key(request, await read_json(request)))
        return JSONResponse(responses.done(name))

    endpoint.__doc__ = description
    return endpoint
