"""Managing a service, for keys with the permission `operate` or `storage`: `client.admin`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, service_pb2, service_pb2_grpc
from img2img_client import convert, requests


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemDetails:
    """How the service is doing. `gpu_usage`: share of the last seconds, 0 to 1."""

    server_version: str
    uptime_seconds: float
    model_count: int
    queued_jobs: int
    queue_duration_seconds: float
    gpu_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSettings:
    """A tenant's own S3 storage; see img2img/v1/service.proto. The keys are never given back."""

    public_url: str
    region_name: str
    endpoint_url: str
    image_directory: str
    aws_access_key_id: str = field(default="", repr=False)
    aws_secret_access_key: str = field(default="", repr=False)
    bucket: str = ""
    deploy_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageUpdate:
    """What is stored now, without the keys, and what to know about it; mostly nothing."""

    settings: StorageSettings
    warning: str


def _update_request(
    settings: StorageSettings, check_connection: bool
) -> service_pb2.UpdateStorageSettingsRequest:
    return requests.build(
        service_pb2.UpdateStorageSettingsRequest,
        settings=requests.build(service_pb2.StorageSettings, **asdict(settings)),
        check_connection=check_connection,
    )


class Admin:
    """Methods raise PermissionDeniedError for a key without `storage` (storage) or `operate`."""

    def __init__(self, channel: grpc.Channel, call: Callable[..., Any]) -> None:
        self._stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        self._storage = service_pb2_grpc.Img2ImgServiceStub(channel)
        self._call = call

    def system_details(self) -> SystemDetails:
        """How the service is doing."""
        request = admin_service_pb2.GetSystemDetailsRequest()
        return convert.read(SystemDetails, self._call(self._stub.GetSystemDetails, request))

    def restart_server(self) -> None:
        """Restarts every worker; its running jobs start anew."""
        self._call(self._stub.RestartServer, admin_service_pb2.RestartServerRequest())

    def update_server(self) -> None:
        """Has workers read settings and model files again, which restarts them."""
        self._call(self._stub.UpdateServer, admin_service_pb2.UpdateServerRequest())

    def clear_cache(self) -> None:
        """Empties the workers' caches."""
        self._call(self._stub.ClearCache, admin_service_pb2.ClearCacheRequest())

    def clear_queue(self) -> int:
        """Ends the tenant's waiting jobs as failed; returns how many."""
        request = admin_service_pb2.ClearQueueRequest()
        return int(self._call(self._stub.ClearQueue, request).cleared_jobs)

    def update_storage(
        self, settings: StorageSettings, *, check_connection: bool = False
    ) -> StorageUpdate:
        """Has the files of jobs accepted from now on go to the tenant's own S3 storage.

        Args:
            check_connection: store and read a small file first; nothing is changed when the
                storage does not take it.

        Raises:
            InvalidRequestError: settings are wrong, or the check says so; `violations` names them.
        """
        request = _update_request(settings, check_connection)
        return convert.read(StorageUpdate, self._call(self._storage.UpdateStorageSettings, request))

    def reset_storage(self, deploy_type: str = "") -> None:
        """Has the files of jobs accepted from now on stay with the service."""
        request = requests.build(service_pb2.ResetStorageSettingsRequest, deploy_type=deploy_type)
        self._call(self._storage.ResetStorageSettings, request)


class AsyncAdmin:
    """Every method takes, returns and raises what its namesake in Admin does."""

    def __init__(self, channel: grpc.aio.Channel, call: Callable[..., Awaitable[Any]]) -> None:
        self._stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        self._storage = service_pb2_grpc.Img2ImgServiceStub(channel)
        self._call = call

    async def system_details(self) -> SystemDetails:
        """As Admin.system_details."""
        request = admin_service_pb2.GetSystemDetailsRequest()
        return convert.read(SystemDetails, await self._call(self._stub.GetSystemDetails, request))

    async def restart_server(self) -> None:
        """As Admin.restart_server."""
        await self._call(self._stub.RestartServer, admin_service_pb2.RestartServerRequest())

    async def update_server(self) -> None:
        """As Admin.update_server."""
        await self._call(self._stub.UpdateServer, admin_service_pb2.UpdateServerRequest())

    async def clear_cache(self) -> None:
        """As Admin.clear_cache."""
        await self._call(self._stub.ClearCache, admin_service_pb2.ClearCacheRequest())

    async def clear_queue(self) -> int:
        """As Admin.clear_queue."""
        request = admin_service_pb2.ClearQueueRequest()
        return int((await self._call(self._stub.ClearQueue, request)).cleared_jobs)

    async def update_storage(
        self, settings: StorageSettings, *, check_connection: bool = False
    ) -> StorageUpdate:
        """As Admin.update_storage."""
        request = _update_request(settings, check_connection)
        told = await self._call(self._storage.UpdateStorageSettings, request)
        return convert.read(StorageUpdate, told)

    async def reset_storage(self, deploy_type: str = "") -> None:
        """As Admin.reset_storage."""
        request = requests.build(service_pb2.ResetStorageSettingsRequest, deploy_type=deploy_type)
        await self._call(self._storage.ResetStorageSettings, request)
