"""The unmodified official Python SDK against a served gateway (docs/http-contract.md#sdk)."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from tests.http_stack import PHOTO_URL, ServedGateway, served_gateway
from tests.readme import ROOT, blocks

# The SDK was written for an older pydantic, which emits many warnings.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from modelslab_py.core.apis.realtime import Realtime
    from modelslab_py.core.client import Client
    from modelslab_py.schemas.realtime import RealtimeImage2ImageSchema, RealtimeText2ImageSchema

pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method:DeprecationWarning")


def realtime(gateway: ServedGateway, *, key: str = "dev-key", enterprise: bool = True) -> Realtime:
    """Returns the client of the SDK, configured as in the contract but with shorter timeouts."""
    client = Client(api_key=key, fetch_retry=3, fetch_timeout=0)
    client.base_url = f"http://{gateway.address}/api/"
    return Realtime(client, enterprise=enterprise)


def request(**options: Any) -> RealtimeImage2ImageSchema:
    return RealtimeImage2ImageSchema(
        **{"prompt": "a harbour at dusk", "init_image": PHOTO_URL, **options}
    )


async def call(method: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """Calls the SDK in a thread: it blocks, and the gateway runs in this event loop."""
    answer: dict[str, Any] = await asyncio.to_thread(method, *given)
    return answer


@pytest.mark.parametrize("enterprise", [True, False], ids=["enterprise", "v6"])
async def test_image_to_image_waits_for_the_image(enterprise: bool) -> None:
    async with served_gateway() as gateway:
        gateway.engine.release()
        api = realtime(gateway, enterprise=enterprise)
        done = await call(api.image_to_image, request(width=256, height=256, samples=2, seed=7))
        assert (done["status"], len(done["output"]), done["meta"]["seed"]) == ("success", 2, 7)


@pytest.mark.parametrize("enterprise", [True, False], ids=["enterprise", "v6"])
async def test_instant_response_is_fetched_later(enterprise: bool) -> None:
    async with served_gateway() as gateway:
        api = realtime(gateway, enterprise=enterprise)
        job = await call(api.image_to_image, request(instant_response=True))
        family = "v1/enterprise" if enterprise else "v6"
        base = f"http://{gateway.address}/api/{family}/realtime"
        assert (job["status"], job["fetch_result"]) == ("processing", f"{base}/fetch/{job['id']}")
        assert (await call(api.fetch, str(job["id"])))["status"] == "processing"
        gateway.engine.release()
        async for _ in gateway.stack.api.watch(f"jobs/{job['id']}"):
            pass
        done = await call(api.fetch, str(job["id"]))
        assert (done["status"], done["output"]) == ("success", job["future_links"])


async def test_the_asynchronous_client_works_too() -> None:
    async with served_gateway() as gateway:
        gateway.engine.release()
        api = realtime(gateway)
        async with api.client as client:
            client.fetch_timeout = 20
            done = await api.async_image_to_image(request())
            again = await api.async_fetch(str(done["id"]))
        assert (done["status"], again) == ("success", done)


async def test_a_failed_job_is_reported() -> None:
    async with served_gateway() as gateway:
        api = realtime(gateway)
        job = await call(api.image_to_image, request(prompt="fail:out of memory"))
        assert (job["status"], job["message"]) == ("failed", "Processing failed: out of memory")
        assert await call(api.fetch, str(job["id"])) == job


async def test_what_is_refused_raises_with_the_body() -> None:
    async with served_gateway() as gateway:
        for api, sent, code, message in (
            (realtime(gateway, key="wrong"), request(), 401, "Invalid API key"),
            (realtime(gateway), request(width=257), 400, "width must be divisible by 8"),
        ):
            with pytest.raises(Exception, match=f"status code {code}") as caught:
                await call(api.image_to_image, sent)
            body = json.loads(str(caught.value).partition(": ")[2])
            assert body["message"] == message


async def test_what_this_service_does_not_do_is_404() -> None:
    async with served_gateway() as gateway:
        with pytest.raises(Exception, match="status code 404"):
            await call(realtime(gateway).text_to_image, RealtimeText2ImageSchema(prompt="x"))


async def printed(*command: str) -> str:
    """Runs a command that must succeed; returns what it prints."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_the_example_of_the_contract_runs() -> None:
    [block] = blocks(ROOT / "docs/http-contract.md", "python")
    async with served_gateway() as gateway:
        gateway.engine.release()
        text = block.text.replace("127.0.0.1:8080", gateway.address).replace("my-key", "dev-key")
        program = f"{text}print(done['status'])"
        assert await printed(sys.executable, "-W", "ignore", "-c", program) == "success\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_examples_of_the_migration_page_run() -> None:
    page = ROOT / "docs/migrating-from-modelslab.md"
    [[curl], [sdk]] = blocks(page, "sh"), blocks(page, "python")
    async with served_gateway() as gateway:
        gateway.engine.release()
        sh, python = (
            block.text.replace("127.0.0.1:8080", gateway.address) for block in (curl, sdk)
        )
        response = json.loads(await printed("bash", "-c", sh))
        assert (response["status"], response["meta"]["n_samples"]) == ("success", 1)
        words = (await printed(sys.executable, "-W", "ignore", "-c", python)).split()
        assert (words[0], int(words[1])) == ("success", response["id"] + 1)
