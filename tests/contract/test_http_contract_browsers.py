"""Web pages that may call the gateway, and the responses to all other pages
(docs/http-contract.md#cors).
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.app import create_app
from img2img_server.settings import Settings
from tests.http_stack import ENTERPRISE, Gateway, body, error_body, gateway_before, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")
HERE = "http://127.0.0.1:8080"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


@pytest.mark.parametrize("path", [f"{ENTERPRISE}/img2img", "/generations/x.png", "/nowhere"])
async def test_options_needs_no_key_and_returns_204(path: str, gateway: Gateway) -> None:
    answer = await gateway.http.options(path, headers={"Origin": "https://app.example"})
    assert (answer.status_code, answer.content) == (204, b"")
    assert {
        name: value for name, value in answer.headers.items() if name.startswith("access-control")
    } == {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": (
            "Content-Type, Authorization, key, X-API-Key, X-Requested-With"
        ),
        "access-control-expose-headers": (
            "Retry-After, X-Request-Id, Img2img-Job, Img2img-Ignored-Fields, Img2img-Warning"
        ),
    }


async def test_browsers_may_read_responses_and_errors(gateway: Gateway) -> None:
    for answer in (await gateway.create(), await gateway.create(key="x"), await gateway.fetch(1)):
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["access-control-expose-headers"].startswith("Retry-After, ")
        assert "access-control-allow-credentials" not in answer.headers


async def test_only_listed_origins_may_read_when_there_is_a_list(gateway: Gateway) -> None:
    listed = "https://a.example, https://b.example"
    async with gateway_before(gateway.stack, cors_origins=listed) as strict:
        for origin, allowed in (
            ("https://b.example", "https://b.example"),
            ("https://c.example", None),
        ):
            answer = await strict.http.post("/nowhere", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert answer.headers["vary"] == "Origin"
        index = await strict.http.get("/", headers={"Host": "127.0.0.1"})
        assert index.headers["vary"] == "Accept, Origin"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """Yields a gateway with the development key, as in the role `local`."""
    config = Settings(api_address=gateway.stack.api.address, dev_key=True)
    async with connect(config) as channel:
        app = create_app(config, channel, gateway.stack.worker.blobs)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=HERE) as http:
            yield http


@pytest.mark.parametrize(
    "origin",
    ["http://127.0.0.1:8080", "http://localhost:5173", "https://[::1]", "http://127.0.0.2"],
)
async def test_with_the_development_key_pages_of_this_machine_may_call(
    origin: str, local: httpx.AsyncClient
) -> None:
    answer = await local.post(
        f"{ENTERPRISE}/img2img", json=body(instant_response=True), headers={"Origin": origin}
    )
    assert answer.json()["status"] == "processing"
    assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "https://127.0.0.1.evil.example"},
        {"Origin": "https://localhost.evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://[::1"},
        # The page's host name resolves to this machine, so its origin is the gateway's own.
        {"Origin": "http://evil.example:8080", "Host": "evil.example:8080"},
        {"Host": "evil.example:8080"},
    ],
    ids=str,
)
async def test_with_the_development_key_other_pages_are_refused(
    headers: dict[str, str], local: httpx.AsyncClient, gateway: Gateway
) -> None:
    jobs = await gateway.stack.bus.jobs.list_ids("dev")
    # Browsers send this request without a preflight request.
    simple = {"Content-Type": "text/plain", **headers}
    for path in (f"{ENTERPRISE}/img2img", f"{ENTERPRISE}/restart_server"):
        answer = await local.post(path, json=body(), headers=simple)
        assert (answer.status_code, answer.json()) == (
            403,
            error_body("ORIGIN_NOT_ALLOWED", "Pages of this origin may not call this service"),
        )
        assert "access-control-allow-origin" not in answer.headers
    preflight = await local.options(f"{ENTERPRISE}/img2img", headers=headers)
    assert "access-control-allow-origin" not in preflight.headers
    assert await gateway.stack.bus.jobs.list_ids("dev") == jobs


@pytest.mark.parametrize(("site", "code"), [("same-origin", 200), ("same-site", 403)])
async def test_a_page_that_a_local_proxy_serves_under_its_own_name_may_call(
    site: str, code: int, local: httpx.AsyncClient
) -> None:
    headers = {"Origin": "https://notebook.example", "Sec-Fetch-Site": site}
    answer = await local.post(
        f"{ENTERPRISE}/img2img", json=body(instant_response=True), headers=headers
    )
    assert answer.status_code == code
    headers["Host"] = "evil.example"
    assert (
        await local.post(f"{ENTERPRISE}/img2img", json=body(), headers=headers)
    ).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "LOCALHOST", "[::1]:80", "127.9.9.9"])
async def test_clients_without_an_origin_may_call(host: str, local: httpx.AsyncClient) -> None:
    answer = await local.post(f"{ENTERPRISE}/img2img", json=body(), headers={"Host": host})
    assert answer.json()["status"] == "success"


@pytest.mark.parametrize("base", ["https://tunnel.example", "http://[2001:db8::1]:8080"])
async def test_a_page_at_the_public_address_may_call(base: str, gateway: Gateway) -> None:
    config = Settings(
        api_address=gateway.stack.api.address, dev_key=True, public_base_url=f"{base}/img"
    )
    async with connect(config) as channel:
        app = create_app(config, channel, gateway.stack.worker.blobs)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as http:
            answer = await http.post(f"{ENTERPRISE}/img2img", json=body(), headers={"Origin": base})
    assert answer.json()["status"] == "success"


async def test_openais_client_may_send_its_headers_from_a_page(gateway: Gateway) -> None:
    asked = "authorization,content-type,openai-project,x-stainless-os,x-other"
    headers = {"Origin": "https://app.example", "Access-Control-Request-Headers": asked}
    answer = await gateway.http.options("/v1/images/edits", headers=headers)
    allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
    assert {"authorization", "content-type", "openai-project", "x-stainless-os"} <= set(allowed)
    assert "x-other" not in allowed
