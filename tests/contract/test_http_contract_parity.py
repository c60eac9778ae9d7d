"""The same request over HTTP and over gRPC gives the same job, the same image and the same
errors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import pytest
import pytest_asyncio
from aiohttp import web
from web_peers import answer, origin, redirect, serving

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, job_pb2, service_pb2
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.compat.modelslab.requests import Img2ImgRequest
from img2img_server.domain import violations
from img2img_server.domain.params import Limits
from img2img_server.imaging.fetch import fetch_image
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from tests.http_stack import (
    ENTERPRISE,
    PHOTO_URL,
    Gateway,
    error_body,
    fetch_photo,
    gateway_before,
    photo_base64,
    running_gateway,
)
from tests.stack import (
    Api,
    Stack,
    photo,
    refusal,
    running_api,
    running_stack,
    running_worker,
    settings,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
GOOD = {"prompt": "a harbour", "width": 256, "height": 256, "seed": 5}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


@dataclass(frozen=True)
class Both:
    """One request in both forms. `spec` has the fields that differ from `body`."""

    name: str
    body: dict[str, Any]
    spec: dict[str, Any] | None = None

    def job_spec(self) -> job_pb2.JobSpec:
        fields = {"init_image": job_pb2.InitImage(url=PHOTO_URL), **GOOD, **self.body}
        return job_pb2.JobSpec(**(fields | (self.spec or {})))


# Fields that only one transport has. Every other field is in both lists below.
GRPC_ONLY = {
    "model",
    "scheduler",
    "output_format",
    "preview_interval_steps",
    "lane",
    "annotations",
    "loras",
    "true_cfg_scale",
    "strength_mode",
    "allow_partial",
    "output_quality",
    "prompt_weights",
    "clip_skip",
}
LIMITING = {"minimum", "maximum", "minLength", "maxLength"}
# The response comes at once; the field is ignored and returned unchanged.
HTTP_ONLY = {"instant_response", "enhance_style"}
INLINE = {"init_image": job_pb2.InitImage(data=photo())}


def address(text: str) -> Both:
    """Returns a request with this address in both forms."""
    spec = {"init_image": job_pb2.InitImage(url=text)}
    return Both(f"init_image {text[:40]!r}", {"init_image": text}, spec)


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
    Both("prompt", {"prompt": "Größe, 灯台 🎨"}),
    Both("init_image", {"init_image": photo_base64()}, INLINE),
    address(f" {PHOTO_URL}\n"),
    address(f"data:image/png;base64,{photo_base64()}"),
    address(f"Data:;name=%22a,b%22;BASE64,{quote(photo_base64(), safe='')}%0A"),
    address(f"data:image/jpeg,{quote(photo())}"),
    Both(
        "everything at once",
        {
            "samples": 2,
            "base64": True,
            "temp": True,
            "track_id": "a",
            "strength": 0.5,
            "negative_prompt": "n",
            "safety_checker": False,
            "enhance_prompt": True,
            "seed": 0,
        },
    ),
]
REFUSED = [
    Both("no prompt", {"prompt": ""}),
    Both("a long prompt", {"prompt": "p" * 2001}),
    Both("a long negative_prompt", {"negative_prompt": "n" * 2001}),
    Both("width", {"width": 513}),
    Both("height", {"height": 128}),
    Both("samples", {"samples": 9}),
    Both("strength", {"strength": 1.5}),
    Both("seed", {"seed": -2}),
    Both("webhook", {"webhook": "nonsense"}),
    Both("webhook without TLS", {"webhook": "http://hooks.example.org/a"}),
    Both("webhook at another protocol's port", {"webhook": "https://hooks.example.org:25/a"}),
    Both("webhook without TLS and other errors", {"webhook": "http://10.0.0.1/a", "width": 5}),
    Both("track_id", {"track_id": "t" * 192}),
    Both("several", {"width": 5, "samples": 0, "strength": -1.0}),
    Both(
        "not an image",
        {"init_image": "AAAA"},
        {"init_image": job_pb2.InitImage(data=b"\0\0\0")},
    ),
    Both(
        "not an image and other errors",  # The image is not decoded before the other checks.
        {"init_image": "AAAA", "width": 5},
        {"init_image": job_pb2.InitImage(data=b"\0\0\0")},
    ),
    address("https://nowhere.example/x"),
    address("HTTPS://nowhere.example/x"),
    address("https://user:secret@nowhere.example/x"),
    address("https://nowhere.example:0/x"),
    address("https://[::1/x"),
    address("https://exa mple/x"),
    address("https://nowhere.example/x\\y"),
    address("https://nowhere.example/x\ty"),
    address("https://nowhere.example/" + "x" * 4096),
    address("data:;base64"),
    address("data:;base64,*"),
    address("data:,"),
    Both("webhook with a user", {"webhook": "https://user@hooks.example.org/a"}),
    Both("webhook with a backslash", {"webhook": "https://hooks.example.org\\a"}),
    Both("webhook of an odd host", {"webhook": "https://hooks_.-.example.org/a"}),
]


async def ended(gateway: Gateway, name: str) -> job_pb2.Job:
    async for _ in gateway.stack.api.watch(name):
        pass
    return await gateway.stack.api.get(name)


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
async def test_both_make_the_same_job_and_image(case: Both, gateway: Gateway) -> None:
    sent = {**GOOD, **case.body}
    answer = (await gateway.create(**sent)).json()
    over_http = await ended(gateway, f"jobs/{answer['id']}")
    over_grpc = await ended(gateway, (await gateway.stack.api.create(case.job_spec())).name)
    over_http.spec.annotations.clear()
    assert over_http.spec == over_grpc.spec
    assert over_http.warning == over_grpc.warning
    assert [s.sha256 for s in over_http.samples] == [s.sha256 for s in over_grpc.samples]
    assert all(sample.sha256 for sample in over_http.samples)


async def test_the_lists_cover_every_field() -> None:
    in_spec = {field.name for field in job_pb2.JobSpec.DESCRIPTOR.fields}
    in_body = Img2ImgRequest.model_fields.keys() - {"key"}
    shared = in_spec - GRPC_ONLY
    assert in_body == shared | HTTP_ONLY
    assert {name for case in EQUAL for name in case.body} == shared
    properties = Img2ImgRequest.model_json_schema()["properties"]
    limited = {
        name
        for name in in_body
        if LIMITING & properties[name].get("anyOf", [properties[name]])[0].keys()
    }
    # Over HTTP, hints are never an error, and the document has no limits for them.
    assert {name for case in REFUSED for name in case.body} == limited


@dataclass(frozen=True)
class Reason:
    """A request that is rejected for a reason other than its fields, in both forms."""

    reason: str
    status: int
    http: Callable[[Gateway, str], Awaitable[httpx.Response]]
    grpc: Callable[[Api, Any], Awaitable[Any]]
    key: str = "weak"


def creating(**changes: Any) -> dict[str, Any]:
    return {
        "http": lambda gateway, key: gateway.create(**GOOD, **changes, key=key),
        "grpc": lambda api, metadata: api.stub.CreateJob(
            service_pb2.CreateJobRequest(spec=Both("", changes).job_spec()), metadata=metadata
        ),
    }


def managing(path: str, method: str) -> dict[str, Any]:
    def over_grpc(api: Api, metadata: Any) -> Any:
        stub = admin_service_pb2_grpc.AdminServiceStub(api.channel)
        request = getattr(admin_service_pb2, f"{method}Request")()
        return getattr(stub, method)(request, metadata=metadata)

    return {
        "http": lambda gateway, key: gateway.http.post(f"{ENTERPRISE}/{path}", json={"key": key}),
        "grpc": over_grpc,
    }


def storing(path: str, method: str) -> dict[str, Any]:
    request = getattr(service_pb2, f"{method}Request")
    return {
        "http": lambda gateway, key: gateway.http.post(
            f"/api/v1/enterprise/{path}", json={"key": key}
        ),
        "grpc": lambda api, metadata: getattr(api.stub, method)(request(), metadata=metadata),
    }


FETCHING: dict[str, Any] = {
    "http": lambda gateway, key: gateway.fetch(10_999_999, key=key),
    "grpc": lambda api, metadata: api.stub.GetJob(
        service_pb2.GetJobRequest(name="jobs/10999999"), metadata=metadata
    ),
}
REASONS = [
    Reason("INVALID_API_KEY", 401, **creating(), key="nobody"),
    Reason("INVALID_API_KEY", 401, **FETCHING, key="nobody"),
    Reason("INVALID_API_KEY", 401, **managing("clear_queue", "ClearQueue"), key="nobody"),
    Reason("PERMISSION_DENIED", 403, **creating(safety_checker=False)),
    Reason("PERMISSION_DENIED", 403, **managing("system_details", "GetSystemDetails")),
    Reason("PERMISSION_DENIED", 403, **managing("restart_server", "RestartServer")),
    Reason("PERMISSION_DENIED", 403, **managing("update_server", "UpdateServer")),
    Reason("PERMISSION_DENIED", 403, **managing("clear_cache", "ClearCache")),
    Reason("PERMISSION_DENIED", 403, **managing("clear_queue", "ClearQueue")),
    Reason("PERMISSION_DENIED", 403, **storing("update_s3", "UpdateStorageSettings")),
    Reason("PERMISSION_DENIED", 403, **storing("reset_s3", "ResetStorageSettings")),
    Reason("JOB_NOT_FOUND", 404, **FETCHING),
    Reason("QUEUE_FULL", 429, **creating(), key="full"),
    Reason("RATE_LIMITED", 429, **creating(), key="slow"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def refusing(
    gateway: Gateway, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Gateway, Api, dict[str, str]]]:
    """Yields a gateway and an api with three keys: without permissions, with a full queue, and with
    a used rate limit.
    """
    made = {
        "weak": new_key("weak", []),
        "full": new_key("full", []),
        "slow": new_key("slow", [], 1),
    }
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text("\n".join(entry for _, entry in made.values()))
    keys = {name: key for name, (key, _) in made.items()} | {"nobody": "i2i_nobody"}
    bus = memory_bus(queue_limit=1)
    engine = FakeEngine(hold_after=1, max_batch_size=1)
    config = settings(queue_limit=1)
    ring = KeyRing(file, dev_key=False)
    async with (
        running_worker(bus, engine) as worker,
        running_api(bus, config, fetch=fetch_photo, keys=ring) as api,
        gateway_before(Stack(bus, api, worker)) as other,
    ):
        await other.create(key=keys["full"], instant_response=True)
        made_slowly = (await other.create(key=keys["slow"], instant_response=True)).json()
        await api.stub.CancelJob(
            service_pb2.CancelJobRequest(name=f"jobs/{made_slowly['id']}"),
            metadata=[("authorization", f"Bearer {keys['slow']}")],
        )
        yield other, api, keys


@pytest.mark.parametrize("case", REASONS, ids=lambda case: f"{case.reason}-{case.status}")
async def test_both_refuse_for_the_same_reason(
    case: Reason, refusing: tuple[Gateway, Api, dict[str, str]]
) -> None:
    gateway, api, keys = refusing
    answer = await case.http(gateway, keys[case.key])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await case.grpc(api, [("authorization", f"Bearer {keys[case.key]}")])
    assert (answer.status_code, refusal(caught.value).reason) == (case.status, case.reason)
    reported = answer.json()["message"]
    if case.status == 403:  # In other cases the contract has its own message.
        assert reported == caught.value.details()
    if case.status == 401:
        assert reported == "Invalid API key"


@dataclass(frozen=True)
class Address:
    """The address of an init image, and the errors of both APIs for it."""

    name: str
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]]
    cause: str = ""
    sentence: str = "Unable to fetch image from provided URL"
    reason: str = violations.Reason.DOWNLOAD_FAILED

    @property
    def text(self) -> str:
        """Returns the message with its cause."""
        return f"{self.sentence}: {self.cause}" if self.cause else self.sentence


async def page(_: web.Request) -> web.Response:
    return web.Response(text="<html>welcome</html>", content_type="text/html")


def status(code: int) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=code, body=photo(), content_type="image/jpeg")

    return refuse


ADDRESSES = [
    Address("404", status(404), "the server answered 404"),
    Address("500", status(500), "the server answered 500"),
    Address("a redirect in circles", redirect("/picture"), "too many redirects, more than 3"),
    Address(
        "a redirect to a private address",
        redirect("http://10.0.0.1/a.png"),
        "the address is not public (after a redirect)",
    ),
    Address(
        "a page",
        page,
        "the URL served an HTML page, not an image; send a PNG, JPEG or WebP image",
        sentence="init_image is not a valid PNG, JPG or WebP image",
        reason=violations.Reason.INVALID_IMAGE,
    ),
]


@pytest.mark.parametrize("case", ADDRESSES, ids=lambda case: case.name)
async def test_both_tell_the_same_of_an_address_that_gives_no_image(case: Address) -> None:
    policy = OutboundPolicy.parse("127.0.0.1")

    async def download(url: str) -> bytes:
        return await fetch_image(url, policy=policy, limits=Limits())

    async with (
        serving(web.get("/picture", case.answer)) as port,
        running_stack(fetch=download) as stack,
        gateway_before(stack) as gateway,
    ):
        url = f"http://127.0.0.1:{port}/picture"
        answer = await gateway.create(**GOOD, init_image=url)
        spec = Both("", {}, {"init_image": job_pb2.InitImage(url=url)}).job_spec()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(spec)
        assert (answer.status_code, answer.json()) == (
            400,
            error_body("INVALID_REQUEST", case.sentence, errors={"init_image": [case.text]}),
        )
        refused = refusal(caught.value)
        assert refused.reasons == {"init_image": case.reason}
        assert refused.violations["init_image"].endswith(f": {case.cause}")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
async def test_both_complain_about_the_same(case: Both, gateway: Gateway) -> None:
    answer = await gateway.create(**{**GOOD, **case.body})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stack.api.create(case.job_spec())
    reported = refusal(caught.value)
    assert (answer.status_code, reported.reason) == (400, "INVALID_REQUEST")
    assert answer.json()["reason"] == reported.reason
    errors = {name: said[0] for name, said in answer.json()["errors"].items()}
    if "seed" in errors:  # The contract keeps its own range.
        assert reported.violations["seed"] == "seed must be between 0 and 9223372036854775807"
        reported.violations["seed"] = "seed must be between 0 and 4294967295"
    if "init_image" in errors:  # The contract has its own message, with the same cause.
        cause = reported.violations.pop("init_image").partition(": ")[2]
        assert errors.pop("init_image").partition(": ")[2] == cause
    assert errors == reported.violations


@pytest.mark.parametrize(
    ("sent", "target"),
    [
        ("/a%28b%29.png?X-Sig=%2f%2B%3a%7E&e=", "/a%28b%29.png?X-Sig=%2f%2B%3a%7E&e="),
        ("/a.png?", "/a.png?"),
        ("/a b.png?q=ü", "/a%20b.png?q=%C3%BC"),
    ],
)
async def test_both_request_the_bytes_of_an_address(sent: str, target: str) -> None:
    policy = OutboundPolicy.parse("127.0.0.1")

    async def download(url: str) -> bytes:
        return await fetch_image(url, policy=policy, limits=Limits())

    async with (
        origin(answer(200, photo())) as server,
        running_stack(fetch=download) as stack,
        gateway_before(stack) as gateway,
    ):
        url = f"http://127.0.0.1:{server.port}{sent}"
        made = await gateway.create(**GOOD, init_image=url)
        assert made.json()["status"] == "success"
        assert made.json()["meta"]["init_image"] == url
        await stack.api.create(Both("", {}, {"init_image": job_pb2.InitImage(url=url)}).job_spec())
        assert server.targets == [f"{target} HTTP/1.1"] * 2
