"""The official Python SDK of the HTTP contract, unmodified, against the service as processes."""

import asyncio
import base64
import warnings
from typing import Any

import pytest

from tests.processes import Role
from tests.real_stack import PHOTO, RealStack, stack, worker

with warnings.catch_warnings():  # the SDK is written for an older pydantic
    warnings.simplefilter("ignore", DeprecationWarning)
    from modelslab_py.core.apis.realtime import Realtime
    from modelslab_py.core.client import Client
    from modelslab_py.schemas.realtime import RealtimeImage2ImageSchema

__all__ = ["stack", "worker"]
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:The `dict` method:DeprecationWarning"),
]


def realtime(stack: RealStack, *, key: str = "dev-key", enterprise: bool = True) -> Realtime:
    client = Client(api_key=key, fetch_retry=30, fetch_timeout=1)
    client.base_url = f"{stack.http_url}/api/"
    return Realtime(client, enterprise=enterprise)


def request(**options: Any) -> RealtimeImage2ImageSchema:
    picture = base64.b64encode(PHOTO.read_bytes()).decode()
    fields = {"prompt": "a cat", "init_image": picture, "width": 256, "height": 256}
    return RealtimeImage2ImageSchema(**{**fields, "num_inference_steps": 4, **options})


@pytest.mark.parametrize("enterprise", [True, False], ids=["enterprise", "v6"])
async def test_pictures_now_and_later_by_both_families(
    stack: RealStack, worker: Role, enterprise: bool
) -> None:
    api = realtime(stack, enterprise=enterprise)
    done = await asyncio.to_thread(api.image_to_image, request(seed=7))
    assert (done["status"], done["meta"]["seed"], len(done["output"])) == ("success", 7, 1)
    job = await asyncio.to_thread(api.image_to_image, request(seed=8, instant_response=True))
    assert (job["status"], job["output"]) == ("processing", [])
    later = await asyncio.to_thread(api.fetch, str(job["id"]))
    assert (later["status"], later["output"]) == ("success", job["future_links"])


async def test_a_bad_key_and_a_bad_request_raise(stack: RealStack, worker: Role) -> None:
    with pytest.raises(Exception, match="Invalid API key"):
        await asyncio.to_thread(realtime(stack, key="wrong").image_to_image, request())
    bad = request(init_image="http://127.0.0.1:9/none.png")
    with pytest.raises(Exception, match="Unable to fetch image"):
        await asyncio.to_thread(realtime(stack).image_to_image, bad)


async def test_the_server_is_managed_and_goes_on(stack: RealStack, worker: Role) -> None:
    api = realtime(stack)
    details = await asyncio.to_thread(api.system_details)
    assert (details["status"], details["model_count"]) == ("success", 1)
    assert (await asyncio.to_thread(api.clear_cache))["message"] == "Cache cleared successfully"
    assert (await asyncio.to_thread(api.update))["message"] == "Server updated successfully"
    job = await asyncio.to_thread(api.image_to_image, request(seed=9, instant_response=True))
    later = await asyncio.to_thread(api.fetch, str(job["id"]))  # the worker has restarted by then
    assert later["status"] == "success"
