"""The official Python SDKs of the HTTP contract and of OpenAI, unmodified, against
`img2img-server local`.
"""

from __future__ import annotations

import asyncio
import base64
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI, InternalServerError
from receiver import until
from transformers import CLIPTextModel

from benchmarks.local_stack import LocalStack, local_stack
from img2img_client import AsyncClient
from img2img_client.events import Started
from tests.real_stack import PHOTO
from tests.tiny_models import ZERO_SNR_V, write_sd

with warnings.catch_warnings():  # The SDK was written for an older pydantic.
    warnings.simplefilter("ignore", DeprecationWarning)
    from modelslab_py.core.apis.realtime import Realtime
    from modelslab_py.core.client import Client
    from modelslab_py.schemas.realtime import RealtimeImage2ImageSchema, RealtimeText2ImageSchema

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:The `dict` method:DeprecationWarning"),
]
BROKEN = "z"  # A prompt with this letter makes the model fail.
FAMILIES = pytest.mark.parametrize("enterprise", [True, False], ids=["enterprise", "v6"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStack]:
    """Yields the command `img2img-server local` with a small model, which runs one job at a
    time.
    """
    folder = tmp_path_factory.mktemp("local")
    model = write_sd(folder / "tiny", tiny_vae=True, scheduler=ZERO_SNR_V)
    broken_for(BROKEN, model)
    async with local_stack(
        folder / "state",
        IMG2IMG_MODEL=str(model),
        IMG2IMG_MAX_BATCH_SIZE="1",
        IMG2IMG_TORCH_THREADS="1",
        IMG2IMG_WARM_UP_SIZES="256x256",
    ) as running:
        yield running


def broken_for(letter: str, model: Path) -> None:
    """Makes the model return NaN for prompts with this letter, like an overflow."""
    text = CLIPTextModel.from_pretrained(model / "text_encoder")
    # the token of the letter within a word and at its end
    tokens = (ord(letter) - ord("a"), ord(letter) - ord("a") + 26)
    with torch.no_grad():
        text.get_input_embeddings().weight[list(tokens)] = torch.nan
    text.save_pretrained(model / "text_encoder")


def realtime(
    service: LocalStack, *, key: str = "dev-key", enterprise: bool = True, tries: int = 60
) -> Realtime:
    client = Client(api_key=key, fetch_retry=tries, fetch_timeout=1)
    client.base_url = f"{service.http_url}/api/"
    return Realtime(client, enterprise=enterprise)


def request(**options: Any) -> RealtimeImage2ImageSchema:
    image = base64.b64encode(PHOTO.read_bytes()).decode()
    fields = {"prompt": "a cat", "init_image": image, "width": 256, "height": 256}
    return RealtimeImage2ImageSchema(**{**fields, "num_inference_steps": 4, **options})


def long_request(**options: Any) -> RealtimeImage2ImageSchema:
    """Returns a job that still runs when the next call arrives."""
    return request(num_inference_steps=50, strength=1.0, instant_response=True, **options)


async def started(service: LocalStack, job: dict[str, Any], times: int = 1) -> None:
    """Returns when the job has been started this many times."""
    async with AsyncClient(service.grpc_address, api_key="dev-key") as client:
        async for event in client.watch(job["id"]):
            times -= isinstance(event, Started)
            if not times:
                return
    raise AssertionError(f"the job was not started {times} times")


@FAMILIES
async def test_images_now_and_later(service: LocalStack, enterprise: bool) -> None:
    api = realtime(service, enterprise=enterprise)
    done = await asyncio.to_thread(api.image_to_image, request(seed=7, samples=2))
    assert (done["status"], done["meta"]["seed"], len(done["output"])) == ("success", 7, 2)
    async with httpx.AsyncClient() as http:
        files = [await http.get(link) for link in done["output"]]
    assert [(file.status_code, file.headers["content-type"]) for file in files] == [
        (200, "image/png")
    ] * 2
    job = await asyncio.to_thread(api.image_to_image, request(seed=8, instant_response=True))
    assert (job["status"], job["output"]) == ("processing", [])
    family = "v1/enterprise" if enterprise else "v6"
    assert job["fetch_result"] == f"{service.http_url}/api/{family}/realtime/fetch/{job['id']}"
    later = await asyncio.to_thread(api.fetch, str(job["id"]))
    assert (later["status"], later["output"]) == ("success", job["future_links"])


@FAMILIES
async def test_a_failed_job_is_reported_at_once_and_when_fetched(
    service: LocalStack, enterprise: bool
) -> None:
    api = realtime(service, enterprise=enterprise, tries=1)
    failed = await asyncio.to_thread(api.image_to_image, request(prompt=f"a {BROKEN}oo"))
    assert failed == {
        "status": "failed",
        "id": failed["id"],
        "message": "Processing failed: the image has values that are not finite",
        "output": [],
    }
    assert await asyncio.to_thread(api.fetch, str(failed["id"])) == failed


@FAMILIES
async def test_a_bad_key_and_bad_requests_raise(service: LocalStack, enterprise: bool) -> None:
    stranger = realtime(service, key="wrong", enterprise=enterprise)
    api = realtime(service, enterprise=enterprise)
    nothing = "http://127.0.0.1:9/none.png"
    for call, sent, refusal in (
        (stranger.image_to_image, request(), "401.*Invalid API key"),
        (stranger.fetch, "10000001", "401.*Invalid API key"),
        (api.image_to_image, request(init_image=nothing), "400.*Unable to fetch image"),
        (api.image_to_image, request(width=257), "400.*width must be divisible by 8"),
        (api.fetch, "1", "404.*Request not found"),
        (api.text_to_image, RealtimeText2ImageSchema(prompt="x"), "404.*Not found"),
    ):
        with pytest.raises(Exception, match=refusal):
            await asyncio.to_thread(call, sent)


async def test_a_bad_key_manages_nothing(service: LocalStack) -> None:
    api = realtime(service, key="wrong")
    calls = (api.system_details, api.restart, api.update, api.clear_cache, api.clear_queue)
    for call in calls:
        with pytest.raises(Exception, match=r"401.*Invalid API key"):
            await asyncio.to_thread(call)


async def test_the_asynchronous_client_does_the_same(service: LocalStack) -> None:
    api = realtime(service)
    async with api.client as client:
        client.fetch_timeout = 60  # This is also the timeout of each request.
        done = await api.async_image_to_image(request(seed=7))
        assert (done["status"], done["meta"]["seed"]) == ("success", 7)
        assert await api.async_fetch(str(done["id"])) == done
        assert (await api.async_system_details())["status"] == "success"


async def test_system_details_have_what_the_contract_lists(service: LocalStack) -> None:
    details = await asyncio.to_thread(realtime(service).system_details)
    assert {name: type(value) for name, value in details.pop("data").items()} == {
        "server_version": str,
        "uptime": str,
        "gpu_usage": str,
    }
    assert details.pop("queue_time") >= 0
    assert details == {"status": "success", "message": "", "model_count": 1, "queue_num": 0}


async def test_clear_queue_ends_what_waits_and_leaves_what_runs(service: LocalStack) -> None:
    api = realtime(service)
    running = await asyncio.to_thread(api.image_to_image, long_request(samples=4))
    await started(service, running)
    # Shorter jobs could run between the steps of the first one.
    waiting = [
        await asyncio.to_thread(api.image_to_image, long_request(samples=4)) for _ in range(2)
    ]

    async def queued() -> int:
        details = await asyncio.to_thread(api.system_details)
        return int(details["queue_num"])

    await until(queued, 2)
    reported = await asyncio.to_thread(api.clear_queue)
    assert reported == {"status": "success", "message": "Queue cleared, server is restarting"}
    once = realtime(service, tries=1)
    for job in waiting:
        cleared = {"status": "failed", "id": job["id"], "message": "Queue cleared", "output": []}
        assert await asyncio.to_thread(once.fetch, str(job["id"])) == cleared
    finished = await asyncio.to_thread(api.fetch, str(running["id"]))
    assert (finished["status"], finished["output"]) == ("success", running["future_links"])


async def test_clear_cache_changes_no_job_and_no_image(service: LocalStack) -> None:
    api = realtime(service)
    before = await asyncio.to_thread(api.image_to_image, request(seed=9))
    reported = await asyncio.to_thread(api.clear_cache)
    assert reported == {"status": "success", "message": "Cache cleared successfully"}
    after = await asyncio.to_thread(api.image_to_image, request(seed=9))
    assert await asyncio.to_thread(api.fetch, str(before["id"])) == before
    async with httpx.AsyncClient() as http:
        first, second = [await http.get(job["output"][0]) for job in (before, after)]
    assert first.content == second.content


@pytest.mark.parametrize(
    ("method", "message"),
    [("restart", "server restarting"), ("update", "Server updated successfully")],
)
async def test_a_restart_hands_the_running_job_back_and_the_gateway_stays_up(
    service: LocalStack, method: str, message: str
) -> None:
    api = realtime(service)
    job = await asyncio.to_thread(api.image_to_image, long_request())
    await started(service, job)
    reported = await asyncio.to_thread(getattr(api, method))
    assert reported == {"status": "success", "message": message}
    assert (await asyncio.to_thread(api.system_details))["status"] == "success"
    await started(service, job, times=2)
    done = await asyncio.to_thread(api.fetch, str(job["id"]))
    assert (done["status"], done["output"]) == ("success", job["future_links"])


async def test_openais_client_edits_and_streams(service: LocalStack) -> None:
    async with AsyncOpenAI(base_url=f"{service.http_url}/v1", api_key="dev-key") as sdk:
        [model] = [each.id async for each in sdk.models.list()]
        options: Any = {"prompt": "a cat", "model": model, "size": "256x256"}
        steps = {"num_inference_steps": 8, "strength": 1.0, "seed": 7}
        raw = await sdk.images.with_raw_response.edit(
            image=PHOTO, response_format="url", n=2, extra_body=steps, **options
        )
        async with httpx.AsyncClient() as http:
            files = [await http.get(each.url or "") for each in raw.parse().data or []]
        stream = await sdk.images.edit(
            image=PHOTO, stream=True, partial_images=3, n=2, extra_body=steps, **options
        )
        events = [event async for event in stream]
        assert [event.type for event in events[-2:]] == ["image_edit.completed"] * 2
        assert 2 <= len(events[:-2]) <= 6
        images = [base64.b64decode(event.b64_json) for event in events[-2:]]
        assert images == [file.content for file in files]
        with pytest.raises(InternalServerError, match="values that are not finite"):
            await sdk.images.edit(image=PHOTO, **(options | {"prompt": f"a {BROKEN}oo"}))
