"""The management calls: a word to every worker, or to the tenant's waiting jobs."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import grpc
import structlog

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc
from img2img_server import __version__
from img2img_server.api.cancel import Canceller
from img2img_server.api.convert import duration
from img2img_server.api.estimate import Estimator
from img2img_server.api.interceptors import current_principal
from img2img_server.api.worker_cache import CachedWorkerRegistry
from img2img_server.interfaces.queue import Control, WorkerCommand

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_CPU = "cpu"  # the device of workers without a GPU

log = structlog.get_logger()


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """Implements img2img.v1.AdminService; see admin_service.proto for the promises."""

    def __init__(
        self,
        control: Control,
        workers: CachedWorkerRegistry,
        estimator: Estimator,
        canceller: Canceller,
    ) -> None:
        self._control = control
        self._workers = workers
        self._estimator = estimator
        self._canceller = canceller
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
        gpus = [worker.busy for worker in workers if worker.device != _CPU]
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

    async def ClearQueue(  # noqa: N802
        self, request: admin_service_pb2.ClearQueueRequest, context: Context
    ) -> admin_service_pb2.ClearQueueResponse:
        principal = current_principal()
        principal.require("operate")
        cleared = await self._canceller.clear(principal.tenant)
        log.info("queue cleared", tenant=principal.tenant, jobs=cleared)
        return admin_service_pb2.ClearQueueResponse(cleared_jobs=cleared)

    async def _broadcast(self, command: WorkerCommand) -> None:
        principal = current_principal()
        principal.require("operate")
        await self._control.broadcast(command)
        self._workers.forget()
        log.info("workers told", command=command, tenant=principal.tenant)
