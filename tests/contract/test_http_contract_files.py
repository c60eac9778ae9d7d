"""Files (docs/http-contract.md#files), CORS, logs, probes and the pages of the documentation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from fastapi.routing import iter_route_contexts
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from img2img_server.compat.modelslab.requests import Img2ImgRequest
from img2img_server.errors import StorageError
from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.app import create_app
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.http_stack import ENTERPRISE, Gateway, body, gateway_before, running_gateway
from tests.stack import settings

pytestmark = pytest.mark.asyncio(loop_scope="module")
PREFIX = "3f8a1c52-6d0e-4b7a-9c41-5e2d7f90ab16"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


# Files.


async def test_an_image_is_served_by_get_and_head(gateway: Gateway) -> None:
    made = (await gateway.create()).json()
    link = made["output"][0]
    got = await gateway.http.get(link)
    job = await gateway.stack.api.get(f"jobs/{made['id']}")
    assert hashlib.sha256(got.content).hexdigest() == job.samples[0].sha256
    assert got.headers["content-type"] == "image/png"
    assert int(got.headers["content-length"]) == len(got.content) == job.samples[0].size_bytes
    head = await gateway.http.head(link)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length", "cache-control", "access-control-allow-origin"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize("folder", ["generations", "temp"])
@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}-0.png",
        f"{PREFIX}-0.base64",
        f"{PREFIX}-0.html",
        f"{PREFIX.upper()}-0.png",
        "x",
        "..%2f..%2fetc%2fpasswd",
        f"%2e%2e/generations/{PREFIX}-0.png",
        f"a/{PREFIX}-0.png",
        f"{PREFIX}-0.png%00",
        f"{PREFIX}-0.png%0a",
        "a%0ab",
    ],
)
async def test_a_missing_file_is_an_uncached_plain_404(
    folder: str, name: str, gateway: Gateway
) -> None:
    for method in ("GET", "HEAD"):
        answer = await gateway.http.request(method, f"/{folder}/{name}")
        assert answer.status_code == 404
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.headers["access-control-allow-origin"] == "*"


async def test_a_line_feed_at_the_end_is_not_overlooked(gateway: Gateway) -> None:
    link = (await gateway.create()).json()["output"][0]
    assert (await gateway.http.get(f"{link}%0a")).status_code == 404


async def test_a_link_to_one_folder_does_not_reach_the_other(gateway: Gateway) -> None:
    link = (await gateway.create(temp=True)).json()["output"][0]
    assert (await gateway.http.get(link.replace("/temp/", "/generations/"))).status_code == 404


class AwayBlobs(MemoryBlobStore):
    """A bucket that cannot be read."""

    async def stat(self, key: str) -> Any:
        raise StorageError("connection refused")

    async def prove_readable(self) -> None:
        raise StorageError("connection refused")


class VanishingBlobs(MemoryBlobStore):
    """A bucket whose lifecycle rule deletes a file between stat and read."""

    async def read(self, key: str) -> AsyncIterator[bytes]:
        raise KeyError(key)
        yield b""


async def test_a_bucket_that_is_away_is_a_plain_503(gateway: Gateway) -> None:
    async with gateway_before(gateway.stack, blobs=AwayBlobs()) as away:
        answer = await away.http.get(f"/generations/{PREFIX}-0.png")
        assert (answer.status_code, answer.headers["cache-control"]) == (503, "no-store")
        assert answer.headers["content-type"].startswith("text/plain")


async def test_a_file_that_goes_while_it_is_asked_for_is_a_404(gateway: Gateway) -> None:
    blobs = VanishingBlobs()
    await blobs.prepare()
    await blobs.put(f"generations/{PREFIX}-0.png", b"x", "image/png")
    async with gateway_before(gateway.stack, blobs=blobs) as vanishing:
        answer = await vanishing.http.get(f"/generations/{PREFIX}-0.png")
        assert answer.status_code == 404


async def test_inline_base64_that_cannot_be_read_is_503_on_fetch_and_never_loses_the_job(
    gateway: Gateway,
) -> None:
    class Unreadable(MemoryBlobStore):
        async def read(self, key: str) -> AsyncIterator[bytes]:
            raise StorageError("connection refused")
            yield b""

    blobs = Unreadable()
    async with gateway_before(gateway.stack, blobs=blobs, base64_inline=True) as away:
        made = (await away.create(base64=True)).json()
        assert made["status"] == "processing"
        assert (await away.fetch(made["id"])).status_code == 503
    async with gateway_before(gateway.stack, base64_inline=True) as back:
        assert (await back.fetch(made["id"])).json()["output"][0].startswith("iVBOR")


# Logs.


async def test_logs_have_no_key_no_prompt_no_image_and_no_query(gateway: Gateway) -> None:
    secrets = {
        "key": "secret-key-1",
        "prompt": "secret-prompt-2",
        "init_image": "https://user-3:pass-3@files.example.org/a.png?signature-4",
    }
    headers = {"Authorization": "Bearer secret-5", "X-API-Key": "secret-6"}
    with capture_logs() as logs:
        for sent in (body(**secrets), body(**(secrets | {"key": "dev-key"})), {"key": []}):
            await gateway.http.post(f"{ENTERPRISE}/img2img?q=secret-7", json=sent, headers=headers)
        await gateway.http.get("/secret-8?secret-9", headers=headers)
    lines = [line for line in logs if line["event"] == "http_request"]
    assert [line["route"] for line in lines] == [f"{ENTERPRISE}/img2img"] * 3 + ["unmatched"]
    shown = repr(logs)
    for hidden in ("secret", "dev-key", "pass-3", "user-3", "signature", "Bearer", "prompt"):
        assert hidden not in shown
    callers = [line["caller"] for line in lines[:3]]
    assert all(len(caller) == 8 for caller in callers)
    assert len(set(callers)) == 3


async def test_requests_are_counted_by_route_and_code(gateway: Gateway) -> None:
    def counted(route: str, method: str, code: str) -> float:
        labels = {"route": route, "method": method, "code": code}
        return REGISTRY.get_sample_value("img2img_http_requests_total", labels) or 0.0

    fetch = f"{ENTERPRISE}/fetch/{{job_id}}"
    cases = ((fetch, "POST", "404"), ("unmatched", "other", "404"), (fetch, "PUT", "405"))
    before = [counted(*case) for case in cases]
    await gateway.fetch("secret")
    await gateway.http.request("BREW", "/secret")
    await gateway.http.put(f"{ENTERPRISE}/fetch/1")
    assert [counted(*case) for case in cases] == [count + 1 for count in before]


# Probes and docs.


async def test_ready_needs_the_api_and_the_bucket(gateway: Gateway) -> None:
    assert (await gateway.http.get("/healthz")).json() == {"status": "alive"}
    for probe in ("/healthz", "/readyz"):  # Uptime monitors send HEAD requests.
        head = await gateway.http.head(probe)
        assert (head.status_code, head.content) == (200, b"")
    ready = await gateway.http.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    changes: dict[str, Any] = {"blobs": AwayBlobs(), "address": "127.0.0.1:1"}
    async with gateway_before(gateway.stack, **changes) as away:
        away.stop.set()
        answer = await away.http.get("/readyz")
        assert (answer.status_code, answer.json()) == (
            503,
            {
                "status": "not ready",
                "api": "UNAVAILABLE: Failed to connect to remote host: Connection refused",
                "bucket": "connection refused",
                "gateway": "stopping",
            },
        )
        assert (await away.http.get("/healthz")).status_code == 200


async def test_the_docs_page_needs_nothing_from_elsewhere(gateway: Gateway) -> None:
    page = await gateway.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "//" not in page.text
    for path in ("assets/swagger-ui-bundle.js", "assets/swagger-ui.css", "start.js"):
        assert f"/docs/{path}" in page.text
        assert (await gateway.http.get(f"/docs/{path}")).status_code == 200
    assert (await gateway.http.get("/docs/assets/nothing.js")).status_code == 404


async def test_openapi_has_every_route_and_every_field(gateway: Gateway) -> None:
    openapi = (await gateway.http.get("/openapi.json")).json()
    config = settings(api_address=gateway.stack.api.address)
    async with connect(config) as channel:
        app = create_app(config, channel, MemoryBlobStore())
    hidden = {"/docs", "/docs/start.js", "/openapi.json", "/docs/assets"}
    hidden |= {"/", "/playground", "/playground/settings.json"}
    hidden |= {"/v1/images/generations"}  # It only says that an image is needed.
    routes = {
        (re.sub(r":\w+}", "}", route.path), method)
        for route in iter_route_contexts(app.routes)
        if route.path not in hidden
        for method in route.methods
    }
    routes -= {("/healthz", "HEAD"), ("/readyz", "HEAD")}  # This path is documented for GET only.
    documented = {
        (path, method.upper()) for path, methods in openapi["paths"].items() for method in methods
    }
    assert documented == routes
    fields = openapi["components"]["schemas"]["Img2ImgRequest"]["properties"]
    assert list(fields) == list(Img2ImgRequest.model_fields)
    assert fields["width"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 256,
        "maximum": 1024,
        "multipleOf": 8,
    }
