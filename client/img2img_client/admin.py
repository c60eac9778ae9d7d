"""The calls that manage a service: `client.admin`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, service_pb2, service_pb2_grpc
from img2img_client import errors, requests
from img2img_client.convert import read
from img2img_client.unary import Asyncio, Blocking, Rpc, Unary


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemDetails:
    """The state of the service. `gpu_usage`: mean of the last seconds, 0 to 1."""

    server_version: str
    uptime_seconds: float
    model_count: int
    queued_jobs: int
    queue_duration_seconds: float
    gpu_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageOfDay:
    """The usage of one tenant on one day, "2026-11-30" in UTC. `price`: of the device seconds; 0 if
    the operator configured no price."""

    day: str
    tenant: str
    jobs: int
    images: int
    device_seconds: float
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Usage by day and tenant, newest first. `currency`: that of the prices; empty without any."""

    usage: tuple[UsageOfDay, ...]
    currency: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """An API key without the key itself. `expire_time` None: never. `last_use_time` None: not in
    about two months; it is late by up to half a minute."""

    id: str
    tenant: str
    label: str
    permissions: tuple[str, ...]
    expire_time: datetime | None
    has_expired: bool
    last_use_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSettings:
    """A tenant's own S3 storage; see img2img/v1/service.proto. Responses never contain the keys."""

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
    """The response of `update_storage`: the settings without the keys, and a warning, which is
    usually empty.
    """

    settings: StorageSettings
    warning: str


def _nothing(_: object) -> None:
    return None


class _Admin:
    """Methods raise PermissionDeniedError for a key without the permission `operate`; for
    system_details, update_storage and reset_storage `storage` is enough."""

    def __init__(self, open_channel: Callable[[], Any], call: Callable[..., Any]) -> None:
        self._open_channel = open_channel
        self._call = call

    def make_stubs(self) -> None:
        """Makes the stubs now: gRPC crashes when one is made for a channel that is closed."""
        _ = self._stub, self._storage

    @cached_property
    def _stub(self) -> Any:
        return admin_service_pb2_grpc.AdminServiceStub(self._open_channel())

    @cached_property
    def _storage(self) -> Any:
        return service_pb2_grpc.Img2ImgServiceStub(self._open_channel())

    @Unary
    def system_details(self) -> Rpc[SystemDetails]:
        """Returns the state of the service."""
        request = admin_service_pb2.GetSystemDetailsRequest()
        return Rpc(self._stub.GetSystemDetails, request, partial(read, SystemDetails))

    @Unary
    def restart_server(self) -> Rpc[None]:
        """Restarts every worker. Running jobs go back to the queue and start again."""
        request = admin_service_pb2.RestartServerRequest()
        return Rpc(self._stub.RestartServer, request, _nothing)

    @Unary
    def update_server(self) -> Rpc[None]:
        """Restarts every worker, which reads its settings and model files again."""
        request = admin_service_pb2.UpdateServerRequest()
        return Rpc(self._stub.UpdateServer, request, _nothing)

    @Unary
    def clear_cache(self) -> Rpc[None]:
        """Empties the workers' caches."""
        request = admin_service_pb2.ClearCacheRequest()
        return Rpc(self._stub.ClearCache, request, _nothing)

    @Unary
    def load_model(self, model: str, worker: str = "") -> Rpc[tuple[str, ...]]:
        """Makes a worker with a catalogue load a model, also in place of others with jobs.

        Args:
            worker: Name of the worker; empty: the service chooses one, unless a worker has loaded
                the model.

        Returns:
            The worker that loads the model now, or the workers that have loaded it.

        Raises:
            NotFoundError: No worker announces the model.
        """
        request = requests.build(admin_service_pb2.LoadModelRequest, model=model, worker=worker)
        return Rpc(self._stub.LoadModel, request, lambda response: tuple(response.workers))

    @Unary
    def unload_model(self, model: str, worker: str = "") -> Rpc[tuple[str, ...]]:
        """Makes workers with a catalogue unload a model. The next request loads it again.

        Args:
            worker: Name of the worker; empty: all workers that have loaded the model.

        Returns:
            The workers that unload the model now.

        Raises:
            NotFoundError: No worker announces the model.
        """
        request = requests.build(admin_service_pb2.UnloadModelRequest, model=model, worker=worker)
        return Rpc(self._stub.UnloadModel, request, lambda response: tuple(response.workers))

    @Unary
    def clear_queue(self) -> Rpc[int]:
        """Fails all queued jobs of the tenant and returns their number."""
        request = admin_service_pb2.ClearQueueRequest()
        return Rpc(self._stub.ClearQueue, request, lambda response: int(response.cleared_jobs))

    @Unary
    def usage(self, days: int = 7) -> Rpc[Usage]:
        """Returns what each tenant used on each of the last days. A key without the permission
        `operate` gets the usage of its own tenant."""
        request = requests.build(admin_service_pb2.GetUsageRequest, days=days)
        return Rpc(self._stub.GetUsage, request, partial(read, Usage))

    @Unary
    def keys(self) -> Rpc[tuple[ApiKey, ...]]:
        """Returns all API keys of the service in the order of the operator's file."""
        request = admin_service_pb2.ListKeysRequest()
        return Rpc(
            self._stub.ListKeys,
            request,
            lambda response: tuple(read(ApiKey, each) for each in response.keys),
        )

    @Unary
    def update_storage(
        self, settings: StorageSettings, *, check_connection: bool = False
    ) -> Rpc[StorageUpdate]:
        """Stores the files of jobs accepted from now on in the tenant's own S3 storage.

        Args:
            check_connection: write and read a small file first. If that fails, nothing changes.

        Raises:
            InvalidRequestError: settings are invalid or the check failed; see `violations`.
        """
        if not isinstance(settings, StorageSettings):
            raise errors.invalid_type("settings", "StorageSettings", settings)
        request = requests.build(
            service_pb2.UpdateStorageSettingsRequest,
            settings=requests.build(service_pb2.StorageSettings, **asdict(settings)),
            check_connection=check_connection,
        )
        update = partial(read, StorageUpdate)
        return Rpc(self._storage.UpdateStorageSettings, request, update)

    @Unary
    def reset_storage(self, deploy_type: str = "") -> Rpc[None]:
        """Stores the files of jobs accepted from now on in the service's own storage."""
        request = requests.build(service_pb2.ResetStorageSettingsRequest, deploy_type=deploy_type)
        return Rpc(self._storage.ResetStorageSettings, request, _nothing)


class Admin(_Admin, Blocking):
    """The calls that manage a service, blocking."""


class AsyncAdmin(_Admin, Asyncio):
    """The calls that manage a service, on asyncio."""
