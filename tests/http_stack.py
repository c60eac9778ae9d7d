"""The REST gateway with the service in one process, and functions that call it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest_asyncio

from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.app import create_app
from img2img_server.gateway.server import serve
from img2img_server.imaging.base import FetchError
from img2img_server.storage.interface import BlobStore
from img2img_server.testing.fake_engine import FakeEngine
from tests.stack import WAIT_SECONDS, Stack, photo, running_stack, settings

BASE = "http://img.example.com"
ENTERPRISE = "/api/v1/enterprise/realtime"
V6 = "/api/v6/realtime"
PHOTO_URL = "https://files.example.org/harbour.png"


def error_body(reason: str, message: str, **more: Any) -> dict[str, Any]:
    """Returns the body of an error in default mode."""
    return {"status": "error", "message": message, "reason": reason, **more}


def legacy_error_body(message: Any) -> dict[str, Any]:
    """Returns the body of an error in legacy mode, which has no reasons."""
    return {"status": "error", "message": message, "messege": message}


META_KEYS = [
    "base64",
    "enhance_prompt",
    "enhance_style",
    "file_prefix",
    "guidance_scale",
    "height",
    "id",
    "init_image",
    "instant_response",
    "n_samples",
    "negative_prompt",
    "opacity",
    "outdir",
    "padding_down",
    "padding_right",
    "pag_scale",
    "prompt",
    "rescale",
    "safety_checker",
    "safety_checker_type",
    "scale_down",
    "seed",
    "strength",
    "temp",
    "track_id",
    "watermark",
    "webhook",
    "width",
]


async def fetch_photo(url: str) -> bytes:
    """Returns the one photo instead of a download."""
    if url != PHOTO_URL:
        raise FetchError
    return photo(96, 64)


def photo_base64() -> str:
    """Returns a small photo in base64."""
    return base64.b64encode(photo()).decode()


def body(**changes: Any) -> dict[str, Any]:
    """Returns a small valid request. `changes` replace its fields, and `...` removes a field."""
    fields = {
        "key": "dev-key",
        "prompt": "a harbour at dusk",
        "init_image": PHOTO_URL,
        "width": 256,
        "height": 256,
        "seed": 1,
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not ...}


@dataclass
class Gateway:
    """A gateway and the components behind it."""

    http: httpx.AsyncClient
    stack: Stack
    stop: asyncio.Event

    async def create(self, path: str = f"{ENTERPRISE}/img2img", **changes: Any) -> httpx.Response:
        return await self.http.post(path, json=body(**changes))

    async def fetch(self, job_id: Any, family: str = ENTERPRISE, **fields: Any) -> httpx.Response:
        sent = {"key": "dev-key", **fields}
        return await self.http.post(f"{family}/fetch/{job_id}", json=sent)


@asynccontextmanager
async def gateway_before(
    stack: Stack, *, blobs: BlobStore | None = None, address: str = "", **changes: Any
) -> AsyncIterator[Gateway]:
    """Yields a gateway in front of a running stack. `changes`: settings."""
    config = settings(api_address=address or stack.api.address, **changes)
    stop = asyncio.Event()
    async with connect(config) as channel:
        app = create_app(config, channel, blobs or stack.worker.blobs, stop)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as http:
            yield Gateway(http, stack, stop)


@asynccontextmanager
async def running_gateway(
    stack: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Gateway]:
    """Yields a gateway with all components behind it. `stack`: arguments of running_stack.
    `changes`: settings.
    """
    async with (
        running_stack(fetch=fetch_photo, **(stack or {})) as running,
        gateway_before(running, **changes) as gateway,
    ):
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def today() -> AsyncIterator[Gateway]:
    async with running_gateway() as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def legacy(today: Gateway) -> AsyncIterator[Gateway]:
    async with gateway_before(today.stack, legacy=True) as gateway:
        yield gateway


@dataclass
class ServedGateway:
    """A gateway on a port."""

    address: str
    http: httpx.AsyncClient
    stack: Stack
    engine: FakeEngine
    stop: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def served_gateway(**changes: Any) -> AsyncIterator[ServedGateway]:
    """Yields a gateway on a free port. Jobs stop after their first step until the engine is
    released. `changes`: settings of the gateway.
    """
    engine = FakeEngine(hold_after=1)
    async with running_stack(engine, fetch=fetch_photo) as stack:
        stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
        base_config = {"api_address": stack.api.address, "http_port": 0, "drain_seconds": 5}
        config = settings(**base_config, **changes)
        task = asyncio.create_task(serve(config, stack.worker.blobs, stop, address.set_result))
        try:
            await asyncio.wait({task, address}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            base = f"http://{address.result()}"
            async with httpx.AsyncClient(base_url=base, timeout=WAIT_SECONDS) as http:
                yield ServedGateway(address.result(), http, stack, engine, stop, task)
        finally:
            stop.set()
            await task
