"""The service's own connections ignore the proxy variables, unless a setting enables them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from structlog.testing import capture_logs

from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.readiness import Readiness
from img2img_server.gateway.server import serve
from img2img_server.nats.bus import connect_bus
from img2img_server.settings import Settings
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.stack import running_stack, settings

NAMES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


@asynccontextmanager
async def recording_proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """Yields the address of a proxy that rejects all requests, and the first lines of the
    requests.
    """
    asked: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).decode().strip())
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}", asked


@pytest.mark.parametrize("use", [False, True], ids=["by default", "when asked to"])
@pytest.mark.parametrize("spelling", [str.lower, str.upper], ids=["lower case", "upper case"])
async def test_the_gateway_reaches_the_api_directly_unless_asked_to_use_the_proxy(
    use: bool, spelling: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_stack() as stack, recording_proxy() as (proxy, asked):
        for name in NAMES:
            monkeypatch.setenv(spelling(name), proxy)
        config = settings(api_address=stack.api.address, use_proxy_environment=use)
        async with connect(config) as channel:
            readiness = Readiness(channel, MemoryBlobStore(), asyncio.Event())
            trouble = await readiness.api_trouble()
    is_used = use and spelling is str.lower  # gRPC reads the variables in lower case only.
    assert (trouble.partition(":")[0], sorted(set(asked))) == (
        ("UNAVAILABLE", [f"CONNECT {stack.api.address} HTTP/1.1"]) if is_used else ("", [])
    )


async def test_the_probe_port_says_what_readyz_says() -> None:
    """The gateway is not ready on either port before the api responds."""
    blobs = MemoryBlobStore()
    await blobs.prepare()
    ready = {}
    async with running_stack() as stack, httpx.AsyncClient() as http:
        for is_there, address in ((True, stack.api.address), (False, "127.0.0.1:1")):
            stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
            config = settings(api_address=address, http_port=0)
            with capture_logs() as logs:
                gateway = asyncio.create_task(serve(config, blobs, stop, started.set_result))
                public = await started
            probes = next(line["probes"] for line in logs if line["event"] == "gateway_listening")
            answers = [await http.get(f"http://{at}/readyz") for at in (public, probes)]
            ready[is_there] = [answer.status_code for answer in answers]
            stop.set()
            await gateway
    assert ready == {True: [200, 200], False: [503, 503]}


async def test_nats_and_the_bucket_are_reached_directly(
    engine_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recording_proxy() as (proxy, asked):
        for name in NAMES:
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        config = engine_settings()
        async with connect_bus(config) as bus, connect_blobs(config) as blobs:
            await blobs.prepare()
            await blobs.put("temp/a.png", b"image", "image/png")
            assert await bus.workers.models() == []
    assert asked == []
