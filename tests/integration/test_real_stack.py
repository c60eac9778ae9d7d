"""The whole service as processes: gRPC api, nats-server, S3 server, gateway and diffusion
engine.
"""

import asyncio
import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
from aiohttp import web
from PIL import Image

from img2img_client import InvalidRequestError, JobCancelledError
from img2img_client.events import StepFinished
from tests import photos
from tests.processes import Role
from tests.real_stack import LONG, PHOTO, SHORT, RealStack, stack, worker
from tests.tiny_models import ZERO_SNR_V, write_sd
from tests.tiny_safety import write_checker

__all__ = ["stack", "worker"]
pytestmark = pytest.mark.asyncio(loop_scope="module")

POST = "/api/v1/enterprise/realtime/img2img"


async def get(url: str) -> tuple[int, str, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, answer.content_type, await answer.read()


async def test_idle_roles_are_small_and_know_no_torch(stack: RealStack, worker: Role) -> None:
    for role in (stack.api, stack.gateway):
        process = psutil.Process(role.pid)
        assert process.memory_info().rss <= 150 * 2**20
        assert not any("torch" in entry.path for entry in process.memory_maps())


async def test_a_streamed_job_ends_with_a_link_that_serves_the_image(
    stack: RealStack, worker: Role
) -> None:
    async with stack.client() as client, client.stream("a cat", PHOTO, **SHORT) as stream:
        events = [event async for event in stream]
        result = await stream.result()
    names = [type(event).__name__ for event in events]
    assert names[:3] == ["Snapshot", "Queued", "Started"]
    assert names[-3:] == ["SampleFinished", "SampleStored", "Succeeded"]
    assert [event.sequence for event in events] == list(range(len(events)))
    sample = result.job.samples[0]
    status, media_type, data = await get(sample.url)
    assert (status, media_type) == (200, "image/png")
    assert hashlib.sha256(data).hexdigest() == sample.sha256
    assert data == result.images[0].data  # The request asks for PNG in events, too.


async def test_the_checker_that_a_model_brings_blanks_what_it_flags(
    stack: RealStack, tmp_path: Path
) -> None:
    model = write_sd(tmp_path / "strict", tiny_vae=True, scheduler=ZERO_SNR_V)
    write_checker(model, margin=3.0, photo=photos.photo())
    choice = {"IMG2IMG_MODEL": str(model), "IMG2IMG_SAFETY_CHECKER": "model"}
    async with stack.worker("strict", **choice), stack.client() as client:
        checked = await client.generate("a cat", PHOTO, model="strict", **SHORT)
        free = await client.generate("a cat", PHOTO, model="strict", safety_checker=False, **SHORT)
    async with stack.client() as client, asyncio.timeout(30):
        # Until the api detects the loss, the model may still be the default of requests.
        while any(m.name == "strict" and m.workers for m in (await client.capabilities()).models):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert [checked.job.samples[0].nsfw, free.job.samples[0].nsfw] == [True, False]
    assert not np.asarray(Image.open(io.BytesIO(checked.images[0].data))).any()
    assert np.asarray(Image.open(io.BytesIO(free.images[0].data))).any()


async def test_the_same_seed_gives_the_same_image_by_bytes_and_by_url(
    stack: RealStack, worker: Role
) -> None:
    async def photo(_: web.Request) -> web.Response:
        return web.Response(body=PHOTO.read_bytes(), content_type="application/octet-stream")

    async def moved(_: web.Request) -> web.Response:
        raise web.HTTPFound("/photo.jpg")

    app = web.Application()
    app.add_routes([web.get("/photo.jpg", photo), web.get("/moved", moved)])
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with stack.client() as client:
            images = [
                (await client.generate("a cat", source, **SHORT)).images[0].sha256
                for source in (PHOTO, f"{base}/photo.jpg", f"{base}/moved", PHOTO.read_bytes())
            ]
            other = await client.generate("a cat", PHOTO, **{**SHORT, "seed": 6})
            with pytest.raises(InvalidRequestError) as caught:
                await client.generate("a cat", f"{base}/none.jpg", **SHORT)
    finally:
        await runner.cleanup()
    assert len(set(images)) == 1
    assert other.images[0].sha256 not in images
    assert [v.field for v in caught.value.violations] == ["init_image"]


async def test_two_clients_at_once_get_what_each_gets_alone(stack: RealStack, worker: Role) -> None:
    async def one(seed: int) -> np.ndarray[Any, Any]:
        async with stack.client() as client:
            result = await client.generate("a cat", PHOTO, **{**SHORT, "seed": seed})
            assert result.job.determinism == "bounded"
            image = Image.open(io.BytesIO(result.images[0].data))
            return np.asarray(image, dtype=np.int16)

    alone = [await one(seed) for seed in (1, 2)]
    together = await asyncio.gather(one(1), one(2))
    assert np.abs(alone[0] - alone[1]).max() > 20  # The images differ.
    for calm, batched in zip(alone, together, strict=True):
        assert np.abs(calm - batched).max() <= 2  # the limit of the determinism class


async def test_a_running_job_is_cancelled_mid_run(stack: RealStack, worker: Role) -> None:
    async with stack.client() as client:
        async with client.stream("a cat", PHOTO, **LONG) as stream:
            steps = 0
            async for event in stream:
                if isinstance(event, StepFinished):
                    steps += 1
                    if steps == 1:
                        await client.cancel(stream.job_name)
            with pytest.raises(JobCancelledError):
                await stream.result()
        assert 1 <= steps < 40
        job = await client.get(stream.job_name)
    assert job.state == "cancelled"


async def test_the_http_contract_answers_with_a_link_that_works(
    stack: RealStack, worker: Role
) -> None:
    body = {
        "key": "dev-key",
        "prompt": "a cat",
        "init_image": base64.b64encode(PHOTO.read_bytes()).decode(),
        "width": "256",
        "height": "256",
        "seed": 5,
        "num_inference_steps": 4,
        "strength": 1.0,
    }
    async with aiohttp.ClientSession() as session:
        async with session.post(stack.http_url + POST, json=body) as answer:
            done = await answer.json()
        assert (answer.status, done["status"]) == (200, "success")
        assert len(done["meta"]) == 28
        fetch = f"{stack.http_url}/api/v1/enterprise/realtime/fetch/{done['id']}"
        async with session.post(fetch, json={"key": "dev-key"}) as answer:
            assert (await answer.json()) == done
        later = {**body, "instant_response": True, "seed": 77}
        async with session.post(stack.http_url + POST, json=later) as answer:
            waiting = await answer.json()
        assert waiting["status"] == "processing"
        events = f"{stack.http_url}/v1/jobs/{waiting['id']}/events"
        headers = {"Authorization": "Bearer dev-key"}
        async with session.get(events, headers=headers) as answer:
            text = await answer.text()
        assert "sample_stored" in text
    for link in (*done["output"], *waiting["future_links"]):
        status, media_type, data = await get(link)
        assert (status, media_type, data[:4]) == (200, "image/png", b"\x89PNG")


BAD_BODIES: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "unknown key": ({"key": "wrong"}, 401, []),
    "missing prompt": ({"prompt": None}, 400, ["prompt"]),
    "strength 1.5": ({"strength": 1.5}, 400, ["strength"]),
    "width 513": ({"width": 513}, 400, ["width"]),
    "samples 9": ({"samples": 9}, 400, ["samples"]),
    "not an image": ({"init_image": "bm90IGFuIGltYWdl"}, 400, ["init_image"]),
    "no such page": ({"init_image": "http://127.0.0.1:9/x.png"}, 400, ["init_image"]),
    "70 megapixels": (
        {"init_image": base64.b64encode(photos.huge_png()).decode()},
        400,
        ["init_image"],
    ),
    "truncated JPEG": (
        {"init_image": base64.b64encode(PHOTO.read_bytes()[:-2000]).decode()},
        400,
        ["init_image"],
    ),
    "30 MB body": ({"init_image": "A" * 30_000_000}, 400, ["init_image"]),
    "several": ({"prompt": "", "width": 5, "samples": 0}, 400, ["prompt", "width", "samples"]),
}


async def test_bad_input_over_http_is_typed_and_leaves_the_servers_as_they_were(
    stack: RealStack, worker: Role
) -> None:
    good = {
        "key": "dev-key",
        "prompt": "a cat",
        "init_image": base64.b64encode(PHOTO.read_bytes()).decode(),
        "width": 256,
        "height": 256,
        "num_inference_steps": 2,
    }
    servers = [psutil.Process(role.pid) for role in (stack.api, stack.gateway)]

    async def send_all(session: aiohttp.ClientSession) -> None:
        for name, (changes, status, fields) in BAD_BODIES.items():
            data = io.BytesIO(json.dumps({**good, **changes}).encode())
            async with session.post(stack.http_url + POST, data=data) as answer:
                body = await answer.json()
            assert (name, answer.status) == (name, status)
            assert body["status"] == "error"
            assert sorted(body.get("errors", {})) == sorted(fields)

    async with aiohttp.ClientSession() as session:
        for _ in range(2):  # The first requests fill the allocators' caches.
            await send_all(session)
        before = [server.memory_info().rss for server in servers]
        for _ in range(2):
            await send_all(session)
        async with asyncio.timeout(30):  # gRPC frees the last messages a moment later.
            while any(  # noqa: ASYNC110
                server.memory_info().rss - was >= 60 * 2**20
                for server, was in zip(servers, before, strict=True)
            ):
                await asyncio.sleep(0.2)
        async with session.post(stack.http_url + POST, json=good) as answer:
            assert (await answer.json())["status"] == "success"
