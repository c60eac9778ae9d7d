"""Checks whether the gateway can serve requests, for /readyz and the probe port."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from img2img_server.compat.modelslab import names
from img2img_server.errors import StorageError
from img2img_server.gateway.api_channel import SERVICE
from img2img_server.storage.interface import BlobStore

WATCH_SECONDS: Final = 2.0
START_SECONDS: Final = 4.0  # Of roles that start together, one becomes ready before the other.
_CHECK_SECONDS: Final = 2.0
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_STATUS_NAME: Final = health_pb2.HealthCheckResponse.ServingStatus.Name
# Parts of gRPC's messages about failed connections, and their usual causes.
_CAUSES: Final = {
    "Hostname Verification": "the api's certificate has no name that IMG2IMG_API_ADDRESS names",
    "CERTIFICATE_VERIFY_FAILED": "IMG2IMG_API_CA_FILE does not hold what signed the api's "
    "certificate",
    "WRONG_VERSION_NUMBER": "the api has no TLS, so IMG2IMG_API_CA_FILE must be unset",
    "Socket closed": "it may have TLS, which needs IMG2IMG_API_CA_FILE here",
    "Deadline Exceeded": f"no response within {_CHECK_SECONDS:g} s",
}
log = structlog.get_logger()


class Readiness:
    """Checks the api, the models and the bucket, and logs when one becomes ready or unavailable."""

    def __init__(self, channel: grpc.aio.Channel, blobs: BlobStore, stop: asyncio.Event) -> None:
        self._health = health_pb2_grpc.HealthStub(channel)
        self._blobs = blobs
        self._stop = stop
        self._logged: dict[str, str] = {}  # the last logged reason by part
        self._were_ready: set[str] = set()
        self._quiet_until = time.monotonic() + START_SECONDS

    async def troubles(self) -> dict[str, str]:
        """Returns the reasons why requests cannot be served, by part. Empty: they can be."""
        api, model, bucket = await asyncio.gather(
            self.api_trouble(), self._model_trouble(), self._bucket_trouble()
        )
        self._note("api", api)
        self._note("bucket", bucket)
        if not api:
            self._note("model", model)
        gateway = "stopping" if self._stop.is_set() else ""
        troubles = {"api": api, "model": "" if api else model, "bucket": bucket, "gateway": gateway}
        return {part: why for part, why in troubles.items() if why}

    async def why_not(self) -> str:
        """Returns why the gateway is not ready, in one sentence, or "" if it is ready.

        A missing model is left out: workers are often started only after the gateway is ready.
        """
        troubles = await self.troubles()
        return "; ".join(f"{part}: {why}" for part, why in troubles.items() if part != "model")

    async def watch(self) -> None:
        """Checks every two seconds, so that changes are logged even if nothing probes."""
        while True:
            await self.troubles()
            await asyncio.sleep(WATCH_SECONDS)

    async def api_trouble(self) -> str:
        """Returns why the api cannot be used, without its address, or "" if it can be used."""
        try:
            status = await self._status(SERVICE)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                return ""  # The api responds; only its budget for calls without a key is used up.
            return f"{error.code().name}: {_reason(error.details() or '')}"
        return "" if status == _SERVING else _STATUS_NAME(status)

    async def _model_trouble(self) -> str:
        try:
            status = await self._status(names.MODELS_SERVICE)
        except grpc.aio.AioRpcError:
            # An api of an older version, which lacks this check, is ready too.
            return ""
        return "" if status == _SERVING else "none announced yet"

    async def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        request = health_pb2.HealthCheckRequest(service=service)
        return (await self._health.Check(request, timeout=_CHECK_SECONDS)).status

    async def _bucket_trouble(self) -> str:
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await self._blobs.prove_readable()
        except TimeoutError:
            return f"no response within {_CHECK_SECONDS:g} s"
        except StorageError as error:
            return str(error)
        return ""

    def _note(self, part: str, why: str) -> None:
        if not why:
            self._were_ready.add(part)
        if why == self._logged.get(part, "") or self._stop.is_set():
            return
        if why and part not in self._were_ready and time.monotonic() < self._quiet_until:
            return
        self._logged[part] = why
        if not why:
            log.info(f"{part}_available")
        elif part == "model":
            # This is normal at every start, since models load slowly.
            log.info("model_unavailable", reason=why)
        else:
            log.warning(f"{part}_unavailable", reason=why)


def _reason(details: str) -> str:
    """Returns the last error of a connection and its usual cause, without the api's address."""
    text = details.rpartition("last error: ")[2]
    text = re.sub(r"\b(?:ipv[46]|unix):\S+: ", "", text).removeprefix("UNKNOWN: ")
    text = re.sub(r"(DNS resolution failed) for \S+:", r"\1:", text)
    cause = next((cause for part, cause in _CAUSES.items() if part in text), "")
    text = text.removesuffix(": OK").rstrip(".")
    return f"{text} ({cause})" if cause else text or "no reason given"
