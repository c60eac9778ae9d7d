"""The gRPC methods that the gateway offers as JSON: their requests, responses and errors."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from img2img.v1 import service_pb2
from img2img_server.errors import JobNotFoundError
from img2img_server.gateway.v1 import protojson
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.contract.test_http_contract_events import parse
from tests.http_stack import (
    BASE,
    Gateway,
    error_body,
    gateway_before,
    photo_base64,
    running_gateway,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}
INIT_IMAGE = 'init_image must be an object with "url", "data" (base64) or "upload"'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


def body(request_id: str = "", **changes: Any) -> dict[str, Any]:
    """Returns a small valid CreateJobRequest; `changes` replace fields of its spec."""
    spec = {
        "prompt": "a harbour at dusk",
        "init_image": {"data": photo_base64()},
        "width": 256,
        "height": 256,
        "seed": 1,
    }
    return {"spec": spec | changes} | ({"request_id": request_id} if request_id else {})


async def create(gateway: Gateway, **fields: Any) -> httpx.Response:
    return await gateway.http.post("/v1/jobs", json=body(**fields), headers=KEY)


async def test_capabilities_are_those_of_the_api(gateway: Gateway) -> None:
    answer = await gateway.http.get("/v1/capabilities", headers=KEY)
    reported = answer.json()
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    assert [model["name"] for model in reported["models"]] == [FAKE_MODEL.name]
    assert reported["models"][0]["schedulers"] == list(FAKE_MODEL.schedulers)
    assert (reported["limits"]["min_side_pixels"], reported["limits"]["max_samples"]) == (256, 4)


async def test_no_cache_may_keep_a_response_of_a_path_that_takes_a_key(gateway: Gateway) -> None:
    job = (await create(gateway)).json()["job"]["id"]
    fetch = f"/api/v6/realtime/fetch/{job}"
    answers = [
        await gateway.http.get(fetch, headers={"key": "dev-key"}),
        await gateway.http.get(fetch, headers={"key": "another"}),
        await gateway.fetch(job),
        await gateway.create(),
        await gateway.http.post("/api/v1/enterprise/realtime/system_details", json={}, headers=KEY),
        await gateway.http.get("/v1/capabilities", headers=KEY),
        await gateway.http.get("/v1/capabilities"),
        await gateway.http.get("/v1/nowhere", headers=KEY),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 200, 200, 200, 200, 401, 404]
    assert [answer.headers.get("cache-control") for answer in answers] == ["no-store"] * 8


async def test_thousands_of_annotations_are_refused_before_they_are_converted(
    gateway: Gateway,
) -> None:
    notes = {f"note-{number}": "" for number in range(17)}
    answer = await gateway.http.post("/v1/jobs", json=body(annotations=notes), headers=KEY)
    assert "annotations must not have more than 16 entries" in answer.json()["message"]
    message = service_pb2.CreateJobRequest()
    assert [one.field for one in protojson.fill(message, body(annotations=notes))] == [
        "annotations"
    ]
    assert len(message.spec.annotations) == 0


async def test_a_job_has_everything_that_the_proto_knows(gateway: Gateway) -> None:
    asked = {
        "model": FAKE_MODEL.name,
        "scheduler": "euler",
        "num_inference_steps": 6,
        "strength": 0.5,
        "output_format": "IMAGE_FORMAT_WEBP",
        "preview_interval_steps": 1,
    }
    answer = await create(gateway, **asked)
    assert answer.status_code == 200
    job = answer.json()["job"]
    assert {name: job["spec"][name] for name in asked} == asked
    assert job["future_urls"][0].startswith(f"{BASE}/generations/")
    events = await gateway.http.get(f"/v1/jobs/{job['id']}/events", headers=KEY)
    kinds = [event["event"] for event in parse(events.text)]
    assert kinds.count("step") == 3
    assert "preview" in kinds
    assert kinds[-1] == "succeeded"


async def test_the_same_request_id_gives_the_same_job_and_no_other_request(
    gateway: Gateway,
) -> None:
    request_id = str(uuid.uuid4())
    first, again = [(await create(gateway, request_id=request_id)).json() for _ in range(2)]
    assert first["job"]["id"] == again["job"]["id"]
    other = await create(gateway, request_id=request_id, prompt="a forest")
    message = f"request_id {request_id} was used for a different request"
    assert (other.status_code, other.json()["message"]) == (409, message)


async def test_all_violations_are_reported_at_once_in_the_contract_s_order(
    gateway: Gateway,
) -> None:
    answer = await create(gateway, strength=2, width=100, prompt="", output_format=77)
    assert answer.status_code == 400
    found = answer.json()
    reasons = [(each["field"], each["reason"]) for each in found.pop("violations")]
    assert reasons == [
        ("prompt", "REQUIRED"),
        ("width", "OUT_OF_RANGE"),
        ("strength", "OUT_OF_RANGE"),
        ("output_format", "NOT_SUPPORTED"),
    ]
    assert found == {
        "status": "error",
        "message": "prompt is required",
        "reason": "INVALID_REQUEST",
        "errors": {
            "prompt": ["prompt is required"],
            "width": ["width must be between 256 and 1024"],
            "strength": ["strength must be between 0 and 1"],
            "output_format": ["output_format must be one of png, jpeg, webp"],
        },
    }


async def test_a_model_that_no_worker_serves_is_reported_at_its_field(gateway: Gateway) -> None:
    answer = await create(gateway, model="dreamer")
    text = "model 'dreamer' is not served here; known models: fake"
    assert (answer.status_code, answer.json()["errors"]) == (400, {"model": [text]})
    assert answer.json()["reason"] == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ({"spec": {"width": "wide"}}, "width", "width must be an integer"),
        ({"spec": {"width": 1.5}}, "width", "width must be an integer"),
        ({"spec": {"width": 2**31}}, "width", "width must be between 256 and 1024"),
        ({"spec": {"samples": -(2**40)}}, "samples", "samples must be between 1 and 4"),
        ({"spec": {"seed": 2**63}}, "seed", f"seed must be between 0 and {2**63 - 1}"),
        ({"spec": {"seed": "x"}}, "seed", "seed must be an integer"),
        ({"spec": {"prompt": 3}}, "prompt", "prompt must be a string"),
        ({"spec": {"strength": True}}, "strength", "strength must be a number"),
        ({"spec": {"samples": False}}, "samples", "samples must be an integer"),
        ({"spec": {"seed": "\u0663"}}, "seed", "seed must be an integer"),
        ({"spec": {"lane": 2**40}}, "lane", "lane must be one of LANE_REALTIME, LANE_BATCH"),
        ({"spec": {"lane": 1.9}}, "lane", "lane must be one of LANE_REALTIME, LANE_BATCH"),
        ({"spec": {"strength": []}}, "strength", "strength must be a number"),
        ({"spec": {"base64": 1}}, "base64", "base64 must be true or false"),
        ({"spec": {"lane": "FAST"}}, "lane", "lane must be one of LANE_REALTIME, LANE_BATCH"),
        (
            {"spec": {"lane": float("inf")}},
            "lane",
            "lane must be one of LANE_REALTIME, LANE_BATCH",
        ),
        ({"spec": {"init_image": {"data": "a"}}}, "init_image", INIT_IMAGE),
        ({"spec": {"init_image": "https://example.org/a.png"}}, "init_image", INIT_IMAGE),
        ({"spec": {"nope": 1}}, "nope", "there is no field nope"),
        ({"spec": "x"}, "spec", "spec must be an object"),
        ({"nope": 1}, "nope", "there is no field nope"),
        ({"\ud800": 1}, "body", r"there is no field '\ud800'"),
    ],
    ids=str,
)
async def test_what_cannot_be_read_is_reported_at_its_field(
    body: dict[str, Any], field: str, text: str, gateway: Gateway
) -> None:
    # httpx does not send infinite numbers.
    content = str(body).replace("'", '"').replace("inf}", "Infinity}")
    content = content.replace("True", "true").replace("False", "false")
    answer = await gateway.http.post("/v1/jobs", content=content, headers=KEY)
    assert (answer.status_code, answer.json()["errors"]) == (400, {field: [text]})


async def test_the_document_has_the_limits_of_every_scale(gateway: Gateway) -> None:
    document = (await gateway.http.get("/openapi.json")).json()
    spec = document["components"]["schemas"]["EstimateJobRequest"]["properties"]["spec"]
    for name in ("guidance_scale", "true_cfg_scale"):
        number = spec["properties"][name]["anyOf"][0]
        assert (number["minimum"], number["maximum"]) == (0, 30)
        answer = await create(gateway, **{name: number["maximum"] + 0.5})
        assert answer.json()["errors"] == {name: [f"{name} must be between 0 and 30"]}


@pytest.mark.parametrize("place", ["Authorization", "X-API-Key", "body", "none"])
async def test_the_key_is_reported_before_everything_else(place: str, gateway: Gateway) -> None:
    for key, code in (("dev-key", 200), ("wrong", 401)):
        value = f"Bearer {key}" if place == "Authorization" else key
        headers = {} if place in ("body", "none") else {place: value}
        fields = {"key": key} if place == "body" else {}
        expected = 401 if place == "none" else code
        answer = await gateway.http.post("/v1/jobs", json=body() | fields, headers=headers)
        assert answer.status_code == expected
        if expected == 401:
            broken = await gateway.http.post("/v1/jobs", json={"x": 1} | fields, headers=headers)
            assert (broken.status_code, broken.json()["reason"]) == (401, "INVALID_API_KEY")
            text = "No API key was sent" if place == "none" else "The API key is wrong"
            assert text in broken.json()["message"]
    assert (await gateway.http.get("/v1/capabilities?key=dev-key")).status_code == 401


async def test_a_running_job_is_cancelled_and_an_ended_one_says_so() -> None:
    engine = FakeEngine(hold_after=1)
    async with running_gateway({"engine": engine}) as gateway:
        job_id = (await create(gateway)).json()["job"]["id"]
        path = f"/v1/jobs/{job_id}:cancel"
        cancelled = await gateway.http.post(path, headers=KEY)
        assert (cancelled.status_code, cancelled.json()["job"]["id"]) == (200, job_id)
        events = await gateway.http.get(f"/v1/jobs/{job_id}/events", headers=KEY)
        assert parse(events.text)[-1]["event"] == "cancelled"
        engine.release()
        ended = (await create(gateway)).json()["job"]["id"]
        await gateway.http.get(f"/v1/jobs/{ended}/events", headers=KEY)
        late = await gateway.http.post(f"/v1/jobs/{ended}:cancel", headers=KEY)
        assert late.status_code == 400
        assert late.json()["message"] == f"jobs/{ended} has already succeeded"


async def test_a_job_is_read_with_its_images_as_over_grpc(gateway: Gateway) -> None:
    made = (await create(gateway)).json()["job"]
    await gateway.http.get(f"/v1/jobs/{made['id']}/events", headers=KEY)  # until the job has ended
    answer = await gateway.http.get(f"/v1/jobs/{made['id']}", headers=KEY)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    job = answer.json()["job"]
    assert (job["id"], job["state"]) == (made["id"], "STATE_SUCCEEDED")
    assert [sample["url"] for sample in job["samples"]] == made["future_urls"]
    assert job["spec"] == made["spec"]
    listed = (await gateway.http.get("/v1/jobs", headers=KEY)).json()["jobs"]
    assert job in listed


@pytest.mark.parametrize("job_id", ["10000999", "abc", "-1", "9" * 20])
async def test_reading_an_unknown_job_is_404_with_a_reason(job_id: str, gateway: Gateway) -> None:
    answer = await gateway.http.get(f"/v1/jobs/{job_id}", headers=KEY)
    expected = error_body("JOB_NOT_FOUND", str(JobNotFoundError(f"jobs/{job_id}")))
    assert (answer.status_code, answer.json()) == (404, expected)
    answer = await gateway.http.get(f"/v1/jobs/{job_id}", headers={"key": "wrong"})
    assert answer.status_code == 401


async def test_reading_the_path_of_cancel_is_a_wrong_method(gateway: Gateway) -> None:
    answer = await gateway.http.get("/v1/jobs/10000001:cancel", headers=KEY)
    assert (answer.status_code, answer.json()["reason"]) == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "POST, OPTIONS"
    answer = await gateway.http.delete("/v1/jobs/10000001", headers=KEY)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, OPTIONS")


@pytest.mark.parametrize("job_id", ["10000999", "abc", "-1", "9" * 20])
async def test_cancelling_an_unknown_job_is_404(job_id: str, gateway: Gateway) -> None:
    answer = await gateway.http.post(f"/v1/jobs/{job_id}:cancel", headers=KEY)
    assert (answer.status_code, answer.json()["message"]) == (
        404,
        str(JobNotFoundError(f"jobs/{job_id}")),
    )
    answer = await gateway.http.post(f"/v1/jobs/{job_id}:cancel", headers={"key": "wrong"})
    assert answer.status_code == 401


async def test_an_api_that_is_away_is_503(gateway: Gateway) -> None:
    async with gateway_before(gateway.stack, address="127.0.0.1:1") as away:
        calls = (
            away.http.get("/v1/capabilities", headers=KEY),
            away.http.post("/v1/jobs", json=body(), headers=KEY),
            away.http.post("/v1/jobs/10000001:cancel", headers=KEY),
        )
        for answer in await asyncio.gather(*calls):
            assert answer.status_code == 503
