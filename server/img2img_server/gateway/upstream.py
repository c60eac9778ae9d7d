"""The api as the gateway calls it: an ordinary gRPC client that turns statuses into refusals."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from img2img.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_pb2,
    job_pb2,
    service_pb2,
    service_pb2_grpc,
)
from img2img_server.compat.modelslab import call_names
from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError, refusal
from img2img_server.setting_files import read_bytes
from img2img_server.settings import Settings, SettingsError
from img2img_server.tracing import injected

SERVICE = "img2img.v1.Img2ImgService"
ADMIN_SERVICE = "img2img.v1.AdminService"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_STATUS_NAME = health_pb2.HealthCheckResponse.ServingStatus.Name
ENDED = (job_pb2.Job.STATE_SUCCEEDED, job_pb2.Job.STATE_FAILED, job_pb2.Job.STATE_CANCELLED)
_KEY_MOST_CHARACTERS = 1024  # longer ones would break the limit on metadata
_CREATE_SECONDS = 60.0  # downloads the init image
_READ_SECONDS = 10.0
_CHECK_SECONDS = 90.0  # a tenant's storage, which may be slow three times
_READY_SECONDS = 2.0
# Calls that change nothing are repeated while an api goes and another one comes.
_RETRIED = (
    (SERVICE, "GetCaller"),
    (SERVICE, "GetCapabilities"),
    (SERVICE, "GetJob"),
    (ADMIN_SERVICE, "GetSystemDetails"),
)
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": service, "method": method} for service, method in _RETRIED],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


def connect(settings: Settings) -> grpc.aio.Channel:
    """A channel to the api role; it connects when it is used and again after a loss.

    Raises:
        SettingsError: api_ca_file cannot be read.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # A connection that died silently is noticed within 40 s, also while streams are silent.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # 60 s otherwise, whatever the line above says
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_http_proxy", int(settings.use_proxy_environment)),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ]
    if settings.api_ca_file is None:
        return grpc.aio.insecure_channel(settings.api_address, options=options)
    try:
        trusted = read_bytes(settings.api_ca_file)
    except OSError as error:
        raise SettingsError(
            f"IMG2IMG_API_CA_FILE: {settings.api_ca_file} cannot be read: {error.strerror}"
        ) from error
    credentials = grpc.ssl_channel_credentials(root_certificates=trusted)
    return grpc.aio.secure_channel(settings.api_address, credentials, options=options)


class Upstream:
    """Calls the api with the caller's own key. Every method raises RequestError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = service_pb2_grpc.Img2ImgServiceStub(channel)
        self._admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    async def caller(self, key: str) -> service_pb2.GetCallerResponse:
        """Returns the tenant and the permissions of the key. Raises BAD_KEY for an unknown one."""
        with _refusing():
            request = service_pb2.GetCallerRequest()
            return await self._stub.GetCaller(request, **_reading(key))

    async def capabilities(self, key: str) -> service_pb2.GetCapabilitiesResponse:
        """The models being served and the limits."""
        with _refusing():
            request = service_pb2.GetCapabilitiesRequest()
            return await self._stub.GetCapabilities(request, **_reading(key))

    async def create(
        self,
        key: str,
        spec: job_pb2.JobSpec,
        link_base: str,
        request_id: str = "",
        warning: str = "",
    ) -> job_pb2.Job:
        """Makes a job, or gives the one that `request_id` has made.

        `warning`: what of the caller's request is not in the spec, for Job.warning.
        """
        told = [(call_names.WARNING, warning.encode(errors="replace"))] if warning else []
        with _refusing(spec.model):
            answer = await self._stub.CreateJob(
                service_pb2.CreateJobRequest(spec=spec, request_id=request_id),
                metadata=(*_metadata(key), (call_names.LINK_BASE, link_base), *told),
                timeout=_CREATE_SECONDS,
            )
        return answer.job

    async def get(self, key: str, job_id: int) -> job_pb2.Job:
        """The record of a job."""
        with _refusing():
            request = service_pb2.GetJobRequest(name=f"jobs/{job_id}")
            answer = await self._stub.GetJob(request, **_reading(key))
        return answer.job

    async def cancel(self, key: str, job_id: int) -> job_pb2.Job:
        """Ends a job that has not ended."""
        with _refusing():
            request = service_pb2.CancelJobRequest(name=f"jobs/{job_id}")
            answer = await self._stub.CancelJob(request, **_reading(key))
        return answer.job

    async def watch(
        self, key: str, job_id: int, after_sequence: int = 0
    ) -> AsyncGenerator[event_pb2.JobEvent, None]:
        """Yields events until the terminal one, without the api's heartbeats.

        Leaving the loop ends the call, not the job.
        """
        with _refusing():
            call = self._stub.WatchJob(
                service_pb2.WatchJobRequest(name=f"jobs/{job_id}", after_sequence=after_sequence),
                metadata=_metadata(key),
            )
            try:
                async for answer in call:
                    if not answer.event.HasField("heartbeat"):
                        yield answer.event
            finally:
                call.cancel()

    async def update_storage(
        self, key: str, request: service_pb2.UpdateStorageSettingsRequest
    ) -> service_pb2.UpdateStorageSettingsResponse:
        """Stores the tenant's S3 details."""
        seconds = _CHECK_SECONDS if request.check_connection else _READ_SECONDS
        with _refusing():
            return await self._stub.UpdateStorageSettings(
                request, metadata=_metadata(key), timeout=seconds
            )

    async def reset_storage(
        self, key: str, deploy_type: str
    ) -> service_pb2.ResetStorageSettingsResponse:
        """Removes the tenant's S3 details."""
        with _refusing():
            request = service_pb2.ResetStorageSettingsRequest(deploy_type=deploy_type)
            return await self._stub.ResetStorageSettings(request, **_reading(key))

    async def system_details(self, key: str) -> admin_service_pb2.GetSystemDetailsResponse:
        """How the service is doing."""
        with _refusing():
            return await self._admin.GetSystemDetails(
                admin_service_pb2.GetSystemDetailsRequest(), **_reading(key)
            )

    async def restart(self, key: str) -> None:
        """Restarts the workers."""
        with _refusing():
            request = admin_service_pb2.RestartServerRequest()
            await self._admin.RestartServer(request, **_reading(key))

    async def update(self, key: str) -> None:
        """Has configuration and model files read again."""
        with _refusing():
            request = admin_service_pb2.UpdateServerRequest()
            await self._admin.UpdateServer(request, **_reading(key))

    async def clear_cache(self, key: str) -> None:
        """Empties the workers' caches."""
        with _refusing():
            request = admin_service_pb2.ClearCacheRequest()
            await self._admin.ClearCache(request, **_reading(key))

    async def clear_queue(self, key: str) -> None:
        """Ends the tenant's waiting jobs."""
        with _refusing():
            request = admin_service_pb2.ClearQueueRequest()
            await self._admin.ClearQueue(request, **_reading(key))

    async def trouble(self) -> str:
        """Why the api may not serve, without an address of it; empty: it may."""
        try:
            status = await self._status(SERVICE)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {_reason(error.details() or '')}"
        return "" if status == _SERVING else _STATUS_NAME(status)

    async def model_trouble(self) -> str:
        """Why no model can be asked for; empty: one can, or the api cannot be asked."""
        with suppress(grpc.aio.AioRpcError):  # an api of an older version does not tell either
            if await self._status(call_names.MODELS_SERVICE) != _SERVING:
                return "none announced yet"
        return ""

    async def _status(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        request = health_pb2.HealthCheckRequest(service=name)
        answer = await self._health.Check(request, timeout=_READY_SECONDS)
        return answer.status


# InlineBase64 of gRPC about failed connections, with their usual causes.
_HINTS = {
    "Hostname Verification": "the api's certificate has no name that IMG2IMG_API_ADDRESS names",
    "CERTIFICATE_VERIFY_FAILED": "IMG2IMG_API_CA_FILE does not hold what signed the api's "
    "certificate",
    "WRONG_VERSION_NUMBER": "the api has no TLS, so IMG2IMG_API_CA_FILE must be unset",
    "Socket closed": "it may have TLS, which needs IMG2IMG_API_CA_FILE here",
    "Deadline Exceeded": f"no answer in {_READY_SECONDS:g} s",
}


def _reason(details: str) -> str:
    """The last error of a connection, without the address, which callers need not know."""
    text = details.rpartition("last error: ")[2]
    text = re.sub(r"\b(?:ipv[46]|unix):\S+: ", "", text).removeprefix("UNKNOWN: ")
    text = re.sub(r"(DNS resolution failed) for \S+:", r"\1:", text)
    hint = next((hint for known, hint in _HINTS.items() if known in text), "")
    text = text.removesuffix(": OK").rstrip(".")
    return f"{text} ({hint})" if hint else text or "no reason given"


def _metadata(key: str) -> tuple[tuple[str, str], ...]:
    """What cannot travel as metadata cannot be a key either."""
    if not key or len(key) > _KEY_MOST_CHARACTERS or not all("!" <= char <= "~" for char in key):
        raise RequestError(ErrorKind.BAD_KEY)
    return (("authorization", f"Bearer {key}"), *injected().items())


def _reading(key: str) -> dict[str, Any]:
    return {"metadata": _metadata(key), "timeout": _READ_SECONDS}


@contextmanager
def _refusing(model: str = "") -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise refusal(error, model) from error
