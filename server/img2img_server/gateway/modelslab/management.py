"""Section 13 of the contract: the management calls, the same in both dialects."""

from __future__ import annotations

from typing import Any

from google.protobuf.duration_pb2 import Duration
from starlette.requests import Request
from starlette.responses import JSONResponse

from img2img.v1 import admin_service_pb2
from img2img_server.gateway.http.http_request import find_key, read_json
from img2img_server.gateway.upstream import Upstream

RESTARTING = "server restarting"
UPDATED = "Server updated successfully"
CACHE_CLEARED = "Cache cleared successfully"
QUEUE_CLEARED = "Queue cleared, server is restarting"  # the contract's text; nothing restarts


class Management:
    """Answers the management calls. The api says who may make them."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def system_details(self, request: Request) -> JSONResponse:
        """POST system_details."""
        told = await self._upstream.system_details(await _key(request))
        return JSONResponse(system_details(told))

    async def restart_server(self, request: Request) -> JSONResponse:
        """POST restart_server."""
        await self._upstream.restart(await _key(request))
        return _done(RESTARTING)

    async def update_server(self, request: Request) -> JSONResponse:
        """POST update_server, and update, the only one of the two that the official SDK calls."""
        await self._upstream.update(await _key(request))
        return _done(UPDATED)

    async def clear_cache(self, request: Request) -> JSONResponse:
        """POST clear_cache."""
        await self._upstream.clear_cache(await _key(request))
        return _done(CACHE_CLEARED)

    async def clear_queue(self, request: Request) -> JSONResponse:
        """POST clear_queue."""
        await self._upstream.clear_queue(await _key(request))
        return _done(QUEUE_CLEARED)


async def _key(request: Request) -> str:
    return find_key(request, await read_json(request))


def _done(message: str) -> JSONResponse:
    return JSONResponse({"status": "success", "message": message})


def system_details(told: admin_service_pb2.GetSystemDetailsResponse) -> dict[str, Any]:
    """The body of system_details."""
    return {
        "status": "success",
        "message": "",
        "model_count": told.model_count,
        "queue_num": told.queued_jobs,
        "queue_time": round(told.queue_duration.ToNanoseconds() / 1e9, 2),
        "data": {
            "server_version": told.server_version,
            "uptime": _spoken(told.uptime),
            "gpu_usage": f"{told.gpu_usage:.0%}",
        },
    }


def _spoken(uptime: Duration) -> str:
    """For example "5d 12h 30m"."""
    hours, seconds = divmod(uptime.seconds, 3600)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h {seconds // 60}m"
