"""OpenAI's own clients for Python and for Node, unmodified, against the gateway."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from PIL import Image
from readme import ROOT, blocks

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.middleware import HeldBody
from tests.http_stack import ServedGateway, served_gateway
from tests.stack import photo

SCRIPT = Path(__file__).with_name("openai_sdk.mjs")
NODE = pytest.mark.skipif(
    shutil.which("node") is None or not (ROOT / "node_modules/openai").is_dir(),
    reason="node and its package openai are not installed",
)
FILE = ("harbour.jpg", photo(), "image/jpeg")


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[ServedGateway]:
    async with served_gateway() as running:
        yield running


def client(gateway: ServedGateway, **options: object) -> AsyncOpenAI:
    options = {"api_key": "dev-key", "base_url": f"http://{gateway.address}/v1", **options}
    return AsyncOpenAI(**options)  # type: ignore[arg-type]


def decoded(text: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text or "")))


async def test_the_python_client_edits_an_image(gateway: ServedGateway) -> None:
    gateway.engine.release()
    async with client(gateway) as sdk:
        assert [model.id async for model in sdk.models.list()] == ["fake"]
        assert (await sdk.models.retrieve("fake")).owned_by == "img2img"
        raw = await sdk.images.with_raw_response.edit(
            image=FILE,
            prompt="a harbour at dusk",
            n=2,
            size="512x512",
            output_format="webp",
            quality="high",
            user="customer 7",
            extra_body={"strength": 0.25},
        )
        images = raw.parse()
        assert raw.headers["img2img-ignored-fields"] == "quality"
        assert [decoded(each.b64_json).format for each in images.data or []] == ["WEBP", "WEBP"]
        assert (images.output_format, images.size) == ("webp", "512x512")
        job = await gateway.stack.api.get(f"jobs/{raw.headers['img2img-job']}")
        assert (job.spec.strength, job.spec.track_id) == (0.25, "customer 7")
        linked = await sdk.images.edit(image=[FILE], prompt="a harbour", response_format="url")
        [link] = linked.data or []
        assert (await gateway.http.get(link.url or "")).content.startswith(b"\x89PNG")


async def test_the_python_client_streams_partial_images(gateway: ServedGateway) -> None:
    gateway.engine.release()
    async with client(gateway) as sdk:
        stream = await sdk.images.edit(
            image=FILE,
            prompt="a harbour at dusk",
            stream=True,
            partial_images=2,
            extra_body={"num_inference_steps": 12},
        )
        *partial, last = [event async for event in stream]
        assert [each.type for each in partial] == ["image_edit.partial_image"] * 2
        assert [decoded(each.b64_json).format for each in partial] == ["JPEG", "JPEG"]
        assert (last.type, decoded(last.b64_json).format) == ("image_edit.completed", "PNG")


async def test_the_python_client_raises_its_own_errors(gateway: ServedGateway) -> None:
    gateway.engine.release()
    async with client(gateway) as sdk:
        with pytest.raises(openai.BadRequestError, match="n must be between 1 and 4") as bad:
            await sdk.images.edit(image=FILE, prompt="a harbour", n=7)
        assert (bad.value.param, bad.value.code) == ("n", "out_of_range")
        assert bad.value.request_id
        with pytest.raises(openai.NotFoundError) as unknown:
            await sdk.images.edit(image=FILE, prompt="a harbour", model="gpt-image-1")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="image is required"):
            await sdk.images.generate(prompt="a harbour")
        with pytest.raises(openai.InternalServerError, match="out of ink"):
            await sdk.images.edit(image=FILE, prompt="fail:out of ink")
        stream = await sdk.images.edit(image=FILE, prompt="fail:out of ink", stream=True)
        with pytest.raises(openai.APIError, match="out of ink"):
            async for _ in stream:
                pass
    async with client(gateway, api_key="wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


async def test_a_timeout_cancels_the_job(gateway: ServedGateway) -> None:
    async with client(gateway, max_retries=0) as sdk:
        with pytest.raises(openai.APITimeoutError):
            await sdk.images.edit(image=FILE, prompt="a harbour", timeout=1.0)
    await gateway.stack.api.reaches("jobs/10000001", job_pb2.Job.STATE_CANCELLED)


async def test_a_retry_with_an_idempotency_key_gets_the_same_job(gateway: ServedGateway) -> None:
    requests = 0

    async def count(_: object) -> None:
        nonlocal requests
        requests += 1
        if requests == 2:
            gateway.engine.release()

    http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [count]})
    async with client(gateway, max_retries=1, http_client=http) as sdk:
        raw = await sdk.images.with_raw_response.edit(
            image=FILE,
            prompt="a harbour",
            timeout=1.0,
            extra_headers={"Idempotency-Key": "order 7"},
        )
    assert (requests, raw.headers["img2img-job"]) == (2, "10000001")


async def test_the_python_client_repeats_a_request_that_had_no_room(
    gateway: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.engine.release()
    know, calls = HeldBody.know, []

    def reject_once(body: HeldBody, tenant: str) -> None:
        calls.append(tenant)
        if len(calls) == 1:
            raise RequestError(ErrorKind.UNAVAILABLE, retry_seconds=1)
        know(body, tenant)

    monkeypatch.setattr(HeldBody, "know", reject_once)
    async with client(gateway) as sdk:
        images = await sdk.images.edit(image=FILE, prompt="a harbour")
    assert (len(calls), len(images.data or [])) == (2, 1)


@NODE
async def test_the_node_client_does_the_same(gateway: ServedGateway, tmp_path: Path) -> None:
    gateway.engine.release()
    image = tmp_path / "harbour.jpg"
    image.write_bytes(photo())
    base = f"http://{gateway.address}/v1"
    process = await asyncio.create_subprocess_exec(
        "node", str(SCRIPT), base, str(image), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    found = json.loads(out)
    assert found["models"] == ["fake"]
    assert found["images"] == ["iVBORw0KGgo", "iVBORw0KGgo"]
    job = await gateway.stack.api.get(f"jobs/{found['job']}")
    assert (job.spec.strength, found["ignored"]) == (0.25, "quality")
    assert (await gateway.http.get(found["links"][0])).content.startswith(b"\x89PNG")
    partial = ["image_edit.partial_image", "/9j/"]
    assert found["events"] == [partial, partial, ["image_edit.completed", "iVBO"]]
    assert found["errors"] == [
        ["BadRequestError", 400, "out_of_range", "n"],
        ["NotFoundError", 404, "model_not_found", "model"],
        ["BadRequestError", 400, "required", "image"],
        ["AuthenticationError", 401, "invalid_api_key", None],
        ["InternalServerError", 500, "engine_failed", None],
        ["APIError", None, "engine_failed", None],
        ["APIConnectionTimeoutError", None, None, None],
    ]
    name = f"jobs/{int(found['job']) + 5}"
    assert (await gateway.stack.api.get(name)).spec.prompt == "hold:it"
    await gateway.stack.api.reaches(name, job_pb2.Job.STATE_CANCELLED)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_python_and_curl_examples_of_the_page_run(
    gateway: ServedGateway, tmp_path: Path
) -> None:
    page = ROOT / "docs/openai-api.md"
    [[python], [curl]] = blocks(page, "python"), blocks(page, "sh")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    gateway.engine.release()

    async def printed(*command: str, text: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *command,
            text.replace("127.0.0.1:8080", gateway.address),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    words = (await printed(sys.executable, "-c", text=python.text)).split()
    assert words[::2] == ["image_edit.partial_image", "image_edit.completed"]
    assert (tmp_path / "painting.png").read_bytes().startswith(b"\x89PNG")
    response = json.loads(await printed("bash", "-c", text=curl.text))
    assert response["data"][0]["url"].startswith(f"http://{gateway.address}/generations/")


@NODE
async def test_the_node_example_of_the_page_runs(gateway: ServedGateway, tmp_path: Path) -> None:
    [js] = blocks(ROOT / "docs/openai-api.md", "js")
    for name in ("examples", "node_modules"):
        (tmp_path / name).symlink_to(ROOT / name)
    gateway.engine.release()
    script = tmp_path / "example.mjs"
    script.write_text(js.text.replace("127.0.0.1:8080", gateway.address))
    process = await asyncio.create_subprocess_exec("node", str(script), cwd=tmp_path)
    assert await process.wait() == 0
    assert (tmp_path / "painting.png").read_bytes().startswith(b"\x89PNG")
