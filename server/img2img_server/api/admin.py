"""The calls that manage the service and the storage settings of tenants."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import grpc
import structlog

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, service_pb2
from img2img_server import __version__, clock, errors
from img2img_server.api.cancel import Canceller
from img2img_server.api.convert import duration, optional_time
from img2img_server.api.convert_service import storage_details, storage_settings
from img2img_server.api.deps import ApiDeps
from img2img_server.api.estimate import Estimator
from img2img_server.api.interceptors import current_principal
from img2img_server.api.keys import KeyRing, Principal
from img2img_server.compat.modelslab.server_types import WITHOUT_EFFECT, validate_server_type
from img2img_server.domain.models import WorkerInfo
from img2img_server.domain.price import Price
from img2img_server.domain.storage import REALTIME, validate_storage
from img2img_server.domain.violations import Reason, Violation, out_of_range, required
from img2img_server.interfaces.queue import ModelCommand, WorkerCommand
from img2img_server.nats.usage import MOST_DAYS
from img2img_server.outbound.policy import ForbiddenAddressError
from img2img_server.storage.tenant_s3 import TenantS3

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_USAGE_DAYS = 7
_CPU = "cpu"  # the device name of workers without a GPU

log = structlog.get_logger()


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """Implements img2img.v1.AdminService; admin_service.proto documents the calls."""

    def __init__(
        self, deps: ApiDeps, estimator: Estimator, canceller: Canceller, keys: KeyRing
    ) -> None:
        self._keys = keys
        self._key_uses = deps.bus.key_uses
        self._control = deps.bus.control
        self._workers = deps.workers
        self._estimator = estimator
        self._canceller = canceller
        self._usage = deps.bus.usage
        self._price = Price.parse(deps.settings.device_second_price)
        self._started_at = time.monotonic()

    async def GetSystemDetails(  # noqa: N802
        self, request: admin_service_pb2.GetSystemDetailsRequest, context: Context
    ) -> admin_service_pb2.GetSystemDetailsResponse:
        principal = current_principal()
        tenant = ""
        if "storage" in principal.permissions and "operate" not in principal.permissions:
            tenant = principal.tenant
        else:
            principal.require("operate")
        workers = await self._workers.workers()
        queued, seconds = await self._estimator.backlog(tenant)
        gpus = _gpu_usage(workers)
        return admin_service_pb2.GetSystemDetailsResponse(
            server_version=__version__,
            uptime=duration(time.monotonic() - self._started_at),
            model_count=len({worker.model.name for worker in workers}),
            queued_jobs=queued,
            queue_duration=duration(seconds),
            gpu_usage=sum(gpus) / len(gpus) if gpus else 0.0,
        )

    async def RestartServer(  # noqa: N802
        self, request: admin_service_pb2.RestartServerRequest, context: Context
    ) -> admin_service_pb2.RestartServerResponse:
        await self._broadcast(WorkerCommand.RESTART)
        return admin_service_pb2.RestartServerResponse()

    async def UpdateServer(  # noqa: N802
        self, request: admin_service_pb2.UpdateServerRequest, context: Context
    ) -> admin_service_pb2.UpdateServerResponse:
        await self._broadcast(WorkerCommand.RESTART)
        return admin_service_pb2.UpdateServerResponse()

    async def ClearCache(  # noqa: N802
        self, request: admin_service_pb2.ClearCacheRequest, context: Context
    ) -> admin_service_pb2.ClearCacheResponse:
        await self._broadcast(WorkerCommand.CLEAR_CACHE)
        return admin_service_pb2.ClearCacheResponse()

    async def LoadModel(  # noqa: N802
        self, request: admin_service_pb2.LoadModelRequest, context: Context
    ) -> admin_service_pb2.LoadModelResponse:
        workers = await self._catalogue_workers(request.model, request.worker)
        loaded = [worker for worker in workers if worker.is_loaded]
        if not loaded:
            likely = min(workers, key=lambda it: (not it.serves, it.load_seconds, it.name))
            await self._command_models([likely], loads=True)
            loaded = [likely]
        return admin_service_pb2.LoadModelResponse(workers=_processes(loaded))

    async def UnloadModel(  # noqa: N802
        self, request: admin_service_pb2.UnloadModelRequest, context: Context
    ) -> admin_service_pb2.UnloadModelResponse:
        workers = await self._catalogue_workers(request.model, request.worker)
        loaded = [worker for worker in workers if worker.is_loaded]
        await self._command_models(loaded, loads=False)
        return admin_service_pb2.UnloadModelResponse(workers=_processes(loaded))

    async def _catalogue_workers(self, model: str, worker: str) -> list[WorkerInfo]:
        """Returns the announcements of a model by workers with a catalogue, at least one.

        Args:
            worker: The only worker; empty: all workers.

        Raises:
            PermissionDeniedError, InvalidRequestError, ModelNotFoundError, NoCatalogueError,
            UnavailableError.
        """
        current_principal().require("operate")
        self._workers.forget()
        if not model:
            raise errors.InvalidRequestError([required("model")])
        announced = [each for each in await self._workers.announced() if not each.draining]
        serving = [each for each in announced if each.model.name == model]
        if not serving:
            known = sorted({each.model.name for each in announced})
            raise errors.ModelNotFoundError(model, tuple(known))
        able = [each for each in serving if each.has_catalogue]
        if not able:
            raise errors.NoCatalogueError(model)
        if worker:
            # Jobs name the worker together with its model.
            names = (worker, f"{worker}/{model}")
            wanted = [each for each in able if each.name in names]
            if not wanted:
                served = ", ".join(sorted(_processes(able)))
                text = f"worker must be one of those with a catalogue that has {model!r}: {served}"
                raise errors.InvalidRequestError([Violation("worker", Reason.NOT_SUPPORTED, text)])
            able = wanted
        return able

    async def _command_models(self, workers: Sequence[WorkerInfo], *, loads: bool) -> None:
        for worker in workers:
            await self._control.command_model(ModelCommand(worker=worker.name, loads=loads))
            log.info("model_command_sent", worker=worker.name, loads=loads)
        self._workers.forget()

    async def ClearQueue(  # noqa: N802
        self, request: admin_service_pb2.ClearQueueRequest, context: Context
    ) -> admin_service_pb2.ClearQueueResponse:
        principal = current_principal()
        principal.require("operate")
        cleared = await self._canceller.clear(principal.tenant)
        log.info("queue_cleared", tenant=principal.tenant, jobs=cleared)
        return admin_service_pb2.ClearQueueResponse(cleared_jobs=cleared)

    async def GetUsage(  # noqa: N802
        self, request: admin_service_pb2.GetUsageRequest, context: Context
    ) -> admin_service_pb2.GetUsageResponse:
        days = request.days or _USAGE_DAYS
        if not 1 <= days <= MOST_DAYS:
            raise errors.InvalidRequestError([out_of_range("days", 1, MOST_DAYS)])
        principal = current_principal()
        tenant = "" if "operate" in principal.permissions else principal.tenant
        today = datetime.fromtimestamp(clock.now(), UTC).date()
        return admin_service_pb2.GetUsageResponse(
            usage=[
                admin_service_pb2.UsageOfDay(
                    day=str(each.day),
                    tenant=each.tenant,
                    jobs=each.usage.jobs,
                    images=each.usage.images,
                    device_seconds=each.usage.device_seconds,
                    price=self._price.of(each.usage.device_seconds),
                )
                for each in await self._usage.read(today, days, tenant)
            ],
            currency=self._price.currency,
        )

    async def ListKeys(  # noqa: N802
        self, request: admin_service_pb2.ListKeysRequest, context: Context
    ) -> admin_service_pb2.ListKeysResponse:
        caller = current_principal()
        caller.require("operate")
        uses = await self._key_uses.read()
        return admin_service_pb2.ListKeysResponse(
            keys=[
                admin_service_pb2.ApiKey(
                    id=each.key_id,
                    tenant=each.tenant,
                    label=each.label,
                    permissions=sorted(each.permissions),
                    expire_time=optional_time(each.expire_time),
                    has_expired=each.has_expired,
                    last_use_time=optional_time(uses.get(each.key_id)),
                )
                for each in self._keys.principals()
            ]
        )

    async def _broadcast(self, command: WorkerCommand) -> None:
        principal = current_principal()
        principal.require("operate")
        await self._control.broadcast(command)
        self._workers.forget()
        log.info("worker_command_sent", command=command, tenant=principal.tenant)


def _gpu_usage(workers: Sequence[WorkerInfo]) -> list[float]:
    """Returns the share of the time in which each GPU works; the models of a worker share one."""
    usage: dict[str, float] = {}
    for worker in workers:
        if worker.is_loaded and worker.device != _CPU:
            (process,) = _processes([worker])
            usage[process] = min(1.0, usage.get(process, 0.0) + worker.busy)
    return list(usage.values())


def _processes(workers: Sequence[WorkerInfo]) -> list[str]:
    """Returns the names of the workers without their models."""
    return [worker.name.removesuffix(f"/{worker.model.name}") for worker in workers]


class StorageCalls:
    """Implements UpdateStorageSettings and ResetStorageSettings."""

    def __init__(self, deps: ApiDeps) -> None:
        self._storage = deps.bus.storage
        self._policy = deps.policy
        self._s3 = TenantS3(deps.policy)

    async def update(
        self, principal: Principal, request: service_pb2.UpdateStorageSettingsRequest
    ) -> service_pb2.UpdateStorageSettingsResponse:
        """Stores the settings, after a check if the request asks for one.

        Raises:
            PermissionDeniedError, InvalidRequestError, StorageKeysMissingError, UnavailableError.
        """
        principal.require("storage")
        deploy_type = request.settings.deploy_type or REALTIME
        details = storage_details(request.settings)
        violations = validate_server_type(deploy_type) + validate_storage(details)
        if all(violation.field != "endpoint_url" for violation in violations):
            violations += self._forbidden(details.endpoint_url)
        if violations:
            raise errors.InvalidRequestError(violations)
        if not self._storage.can_store:
            raise errors.StorageKeysMissingError
        warnings = []
        if deploy_type in WITHOUT_EFFECT:
            text = f"deploy_type {deploy_type} is stored without effect: only realtime runs here"
            warnings.append(text)
        if request.check_connection:
            wrong, warning = await self._s3.check(details)
            if wrong:
                raise errors.InvalidRequestError([wrong])
            warnings.append(warning)
        version = await self._storage.put(principal.tenant, deploy_type, details)
        log.info(
            "storage_settings_stored", tenant=principal.tenant, type=deploy_type, version=version
        )
        return service_pb2.UpdateStorageSettingsResponse(
            settings=storage_settings(details, deploy_type),
            warning="; ".join(filter(None, warnings)),
        )

    async def reset(
        self, principal: Principal, request: service_pb2.ResetStorageSettingsRequest
    ) -> service_pb2.ResetStorageSettingsResponse:
        """Removes the settings. Raises PermissionDeniedError, InvalidRequestError."""
        principal.require("storage")
        deploy_type = request.deploy_type or REALTIME
        if violations := validate_server_type(deploy_type):
            raise errors.InvalidRequestError(violations)
        await self._storage.remove(principal.tenant, deploy_type)
        log.info("storage_settings_removed", tenant=principal.tenant, type=deploy_type)
        return service_pb2.ResetStorageSettingsResponse(deploy_type=deploy_type)

    def _forbidden(self, endpoint_url: str) -> list[Violation]:
        """Checks the endpoint without resolving its name, which workers do."""
        try:
            self._policy.check_url(endpoint_url)
        except ForbiddenAddressError:
            message = "endpoint_url must be a public address"
            return [Violation("endpoint_url", Reason.FORBIDDEN_ADDRESS, message)]
        return []
