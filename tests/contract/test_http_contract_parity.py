"""The same request over HTTP and over gRPC: the same job, the same picture, the same complaints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio

from img2img.v1 import job_pb2
from tests.http_stack import PHOTO_URL, Gateway, photo_base64, running_gateway
from tests.stack import photo, refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")
GOOD = {"prompt": "a harbour", "width": 256, "height": 256, "seed": 5}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


@dataclass(frozen=True)
class Both:
    """One request in both forms; `spec` is what differs from `body`."""

    name: str
    body: dict[str, Any]
    spec: dict[str, Any] | None = None

    def job_spec(self) -> job_pb2.JobSpec:
        fields = {"init_image": job_pb2.InitImage(url=PHOTO_URL), **GOOD, **self.body}
        return job_pb2.JobSpec(**(fields | (self.spec or {})))


INLINE = {"init_image": job_pb2.InitImage(data=photo())}
EQUAL = [
    Both("nothing but the required", {}),
    Both("negative_prompt", {"negative_prompt": "blurry"}),
    Both("width and height", {"width": 320, "height": 264}),
    Both("samples", {"samples": 3}),
    Both("strength", {"strength": 0.25}),
    Both("strength 0", {"strength": 0.0}),
    Both("strength 1", {"strength": 1.0}),
    Both("seed", {"seed": 2**32 - 1, "samples": 2}),
    Both("safety_checker", {"safety_checker": False}),
    Both("enhance_prompt", {"enhance_prompt": True}),
    Both("base64", {"base64": True}),
    Both("temp", {"temp": True}),
    Both("track_id", {"track_id": "order-77"}),
    Both("webhook", {"webhook": "https://hooks.example.org/a"}),
    Both("num_inference_steps", {"num_inference_steps": 8}),
    Both("guidance_scale", {"guidance_scale": 3.5}),
]
REFUSED = [
    Both("no prompt", {"prompt": ""}),
    Both("a long prompt", {"prompt": "p" * 2001}),
    Both("a long negative_prompt", {"negative_prompt": "n" * 2001}),
    Both("width", {"width": 513}),
    Both("height", {"height": 128}),
    Both("samples", {"samples": 9}),
    Both("strength", {"strength": 1.5}),
    Both("seed", {"seed": 2**32}),
    Both("webhook", {"webhook": "nonsense"}),
    Both("webhook without TLS", {"webhook": "http://hooks.example.org/a"}),
    Both("webhook without TLS beside others", {"webhook": "http://10.0.0.1/a", "width": 5}),
    Both("track_id", {"track_id": "t" * 192}),
    Both("several", {"width": 5, "samples": 0, "strength": -1.0}),
    Both(
        "not a picture",
        {"init_image": "AAAA"},
        {"init_image": job_pb2.InitImage(data=b"\0\0\0")},
    ),
    Both(
        "an address that gives none",
        {"init_image": "https://nowhere.example/x"},
        {"init_image": job_pb2.InitImage(url="https://nowhere.example/x")},
    ),
]


async def ended(gateway: Gateway, name: str) -> job_pb2.Job:
    async for _ in gateway.stack.api.watch(name):
        pass
    return await gateway.stack.api.get(name)


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
async def test_both_make_the_same_job_and_picture(case: Both, gateway: Gateway) -> None:
    sent = {**GOOD, **case.body}
    answer = (await gateway.create(**sent)).json()
    over_http = await ended(gateway, f"jobs/{answer['id']}")
    over_grpc = await ended(gateway, (await gateway.stack.api.create(case.job_spec())).name)
    over_http.spec.annotations.clear()
    assert over_http.spec == over_grpc.spec
    assert over_http.warning == over_grpc.warning
    assert [s.sha256 for s in over_http.samples] == [s.sha256 for s in over_grpc.samples]
    assert all(sample.sha256 for sample in over_http.samples)


async def test_both_read_the_same_inline_picture(gateway: Gateway) -> None:
    answer = (await gateway.create(**GOOD, init_image=photo_base64())).json()
    over_http = await ended(gateway, f"jobs/{answer['id']}")
    spec = job_pb2.JobSpec(**GOOD, **INLINE)
    over_grpc = await ended(gateway, (await gateway.stack.api.create(spec)).name)
    assert over_http.samples[0].sha256 == over_grpc.samples[0].sha256


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
async def test_both_complain_about_the_same(case: Both, gateway: Gateway) -> None:
    answer = await gateway.create(**{**GOOD, **case.body})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stack.api.create(case.job_spec())
    told = refusal(caught.value)
    assert (answer.status_code, told.reason) == (400, "INVALID_REQUEST")
    assert {name: said[0] for name, said in answer.json()["errors"].items()} == told.violations
