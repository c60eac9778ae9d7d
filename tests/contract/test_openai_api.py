"""OpenAI's Images API over HTTP: docs/openai-api.md."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import pytest_asyncio
import requests
from PIL import Image
from starlette.types import Message

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.app import create_app
from img2img_server.gateway.openai.requests import HIGH_FIDELITY_STRENGTH
from img2img_server.testing.fake_engine import HOLD_PROMPT, FakeEngine
from tests.http_stack import (
    BASE,
    PHOTO_URL,
    Gateway,
    ServedGateway,
    gateway_before,
    photo_base64,
    running_gateway,
    served_gateway,
)
from tests.stack import Stack, photo, running_stack, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")
EDITS = "/v1/images/edits"
KEY = {"Authorization": "Bearer dev-key"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        running.http.headers.update(KEY)
        yield running


def form(**changes: Any) -> dict[str, Any]:
    """Returns the arguments of a valid request with a form. `...` removes a field."""
    fields = {"prompt": "a harbour at dusk", "size": "256x256", "seed": "1", **changes}
    data = {name: value for name, value in fields.items() if value is not ...}
    return {"data": data, "files": {"image": ("harbour.jpg", photo(), "image/jpeg")}}


async def spec_of(gateway: Gateway, response: httpx.Response) -> job_pb2.JobSpec:
    assert response.status_code == 200, response.text
    return (await gateway.stack.api.get(f"jobs/{response.headers['img2img-job']}")).spec


def error_of(response: httpx.Response) -> tuple[int, str | None, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["code"]


def events_of(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        event, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert event == f"event: {found[-1]['type']}"
    return found


def pixels(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


async def test_a_form_and_json_make_the_same_image(gateway: Gateway) -> None:
    of_form = await gateway.http.post(EDITS, **form())
    made = []
    for image in (
        {"image": photo_base64()},
        {"image": [f"data:image/jpeg;base64,{photo_base64()}"]},
        {"images": [{"image_url": f"data:image/jpeg;base64,{photo_base64()}"}]},
    ):
        body = {"prompt": "a harbour at dusk", "size": "256x256", "seed": 1, **image}
        made.append(await gateway.http.post(EDITS, json=body))
    assert of_form.status_code == 200
    [data] = of_form.json()["data"]
    assert pixels(data["b64_json"]).size == (256, 256)
    assert [response.json()["data"] for response in made] == [[data]] * 3


async def test_a_form_as_open_webui_sends_it_makes_images(gateway: Gateway) -> None:
    data = {"model": "fake", "prompt": "a harbour", "n": 2, "size": "256x256"}
    more = {"background": "transparent", "response_format": "b64_json"}
    file = ("image[]", ("0b1c.png", io.BytesIO(photo(form="PNG")), "image/png"))
    prepared = requests.Request(
        "POST", "http://img.example.com", files=[file], data=data | more
    ).prepare()
    response = await gateway.http.post(
        EDITS, content=prepared.body, headers={"Content-Type": prepared.headers["Content-Type"]}
    )
    assert response.status_code == 200
    assert [pixels(each["b64_json"]).format for each in response.json()["data"]] == ["PNG", "PNG"]
    assert response.headers["img2img-ignored-fields"] == "background"


async def test_a_link_is_returned_if_it_is_asked_for(gateway: Gateway) -> None:
    sent = form(response_format="url", output_format="jpeg", n="2")
    response = await gateway.http.post(EDITS, **sent)
    links = [each["url"] for each in response.json()["data"]]
    files = [await gateway.http.get(link) for link in links]
    assert [file.headers["content-type"] for file in files] == ["image/png"] * 2
    assert response.json()["output_format"] == "png"
    assert response.headers["img2img-ignored-fields"] == "output_format"


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
async def test_an_image_has_the_requested_format(gateway: Gateway, name: str) -> None:
    response = await gateway.http.post(EDITS, **form(output_format=name))
    assert response.json()["output_format"] == name
    assert pixels(response.json()["data"][0]["b64_json"]).format == name.upper()


@pytest.mark.parametrize("name", ["jpeg", "webp"])
async def test_output_compression_is_the_quality(gateway: Gateway, name: str) -> None:
    sizes = []
    for quality in ("0", "50", "100"):
        sent = form(output_format=name, output_compression=quality, seed="3")
        response = await gateway.http.post(EDITS, **sent)
        assert "img2img-ignored-fields" not in response.headers
        sizes.append(len(response.json()["data"][0]["b64_json"]))
    assert sizes == sorted(set(sizes))
    png = await gateway.http.post(EDITS, **form(output_compression="50"))
    assert png.headers["img2img-ignored-fields"] == "output_compression"


async def test_without_a_size_the_image_has_the_aspect_ratio_of_the_init_image(
    gateway: Gateway,
) -> None:
    for size in (..., "auto"):
        sent = {"prompt": "a harbour", "url": PHOTO_URL, "size": size}
        body = {name: value for name, value in sent.items() if value is not ...}
        response = await gateway.http.post(EDITS, json=body)
        assert response.json()["size"] == "624x416"


async def test_the_fields_reach_the_job(gateway: Gateway) -> None:
    sent = form(
        user="customer 7",
        strength="0.25",
        negative_prompt="fog",
        num_inference_steps="8",
        guidance_scale="2.5",
        scheduler="euler",
        seed="77",
    )
    spec = await spec_of(gateway, await gateway.http.post(EDITS, **sent))
    assert (spec.track_id, spec.strength, spec.negative_prompt) == ("customer 7", 0.25, "fog")
    assert (spec.num_inference_steps, spec.guidance_scale) == (8, 2.5)
    assert (spec.scheduler, spec.seed) == ("euler", 77)


@pytest.mark.parametrize(
    ("fields", "strength", "ignored"),
    [
        ({}, 0.7, None),
        ({"input_fidelity": "low"}, 0.7, None),
        ({"input_fidelity": "high"}, HIGH_FIDELITY_STRENGTH, None),
        ({"input_fidelity": "high", "strength": "0.9"}, 0.9, "input_fidelity"),
    ],
    ids=["default", "low", "high", "strength"],
)
async def test_input_fidelity_is_a_strength(
    gateway: Gateway, fields: dict[str, str], strength: float, ignored: str | None
) -> None:
    response = await gateway.http.post(EDITS, **form(**fields))
    assert (await spec_of(gateway, response)).strength == strength
    assert response.headers.get("img2img-ignored-fields") == ignored


async def test_fields_without_effect_are_named(gateway: Gateway) -> None:
    sent: dict[str, Any] = {"prompt": "a harbour", "image": photo_base64()}
    sent |= {"background": "auto", "n": None}
    sent |= {"quality": "high", "partial_images": 2, "Bögen\r\nX: 1": 1, "svg[model]": {}}
    response = await gateway.http.post(EDITS, json=sent)
    named = response.headers["img2img-ignored-fields"]
    assert named == "quality, partial_images, B%C3%B6gen%0D%0AX%3A%201, svg[model]"
    warning = response.headers["img2img-warning"]
    assert warning.startswith("The fields quality, partial_images, ")
    job = await gateway.stack.api.get(f"jobs/{response.headers['img2img-job']}")
    assert "svg[model]" in job.warning


async def test_many_fields_without_effect_are_counted(gateway: Gateway) -> None:
    response = await gateway.http.post(EDITS, **form(**{f"field{n}": "1" for n in range(50)}))
    named = response.headers["img2img-ignored-fields"].split(", ")
    assert (named[0], len(named), named[-1]) == ("field0", 21, "...")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": ...}, (400, "prompt", "required")),
        ({"prompt": "x" * 2001}, (400, "prompt", "too_long")),
        ({"n": "5"}, (400, "n", "out_of_range")),
        ({"n": "two"}, (400, "n", "invalid_type")),
        ({"size": "large"}, (400, "size", "invalid_format")),
        ({"size": "257x256"}, (400, "size", "not_divisible")),
        ({"size": "256x99999"}, (400, "size", "out_of_range")),
        ({"strength": "1.5"}, (400, "strength", "out_of_range")),
        ({"response_format": "png"}, (400, "response_format", "not_supported")),
        ({"output_format": "gif"}, (400, "output_format", "not_supported")),
        (
            {"output_format": "jpeg", "output_compression": "101"},
            (400, "output_compression", "out_of_range"),
        ),
        ({"input_fidelity": "max"}, (400, "input_fidelity", "not_supported")),
        ({"stream": "maybe"}, (400, "stream", "invalid_type")),
        ({"partial_images": "4"}, (400, "partial_images", "out_of_range")),
        ({"partial_images": "x"}, (400, "partial_images", "invalid_type")),
        ({"user": "x" * 192}, (400, "user", "too_long")),
        ({"model": "dall-e-2"}, (404, "model", "model_not_found")),
        ({"seed": ["1", "2"]}, (400, "seed", "too_many")),
    ],
    ids=lambda value: "-".join(map(str, value))[:40] if isinstance(value, dict) else "",
)
async def test_wrong_fields_are_rejected(
    gateway: Gateway, changes: dict[str, Any], error: tuple[int, str, str]
) -> None:
    assert error_of(await gateway.http.post(EDITS, **form(**changes))) == error


async def test_every_wrong_field_is_in_the_message(gateway: Gateway) -> None:
    response = await gateway.http.post(EDITS, **form(n="9", strength="7"))
    message = "n must be between 1 and 4; strength must be between 0 and 1"
    assert response.json()["error"] == {
        "message": message,
        "type": "invalid_request_error",
        "param": "n",
        "code": "out_of_range",
    }


async def test_several_images_masks_and_files_elsewhere_are_rejected(gateway: Gateway) -> None:
    file = ("a.png", photo(form="PNG"), "image/png")
    data = {"prompt": "a harbour"}
    for files, error in (
        ([("image[]", file), ("image[]", file)], (400, "image", "too_many")),
        ([("image", file), ("mask", file)], (400, "mask", "not_supported")),
        ([("mask", file)], (400, "mask", "not_supported")),
        ([("image", ("a.png", b"", "image/png"))], (400, "image", "required")),
        ([("image", ("a.png", b"no image", "image/png"))], (400, "image", "invalid_image")),
    ):
        assert error_of(await gateway.http.post(EDITS, data=data, files=files)) == error
    for image, error in (
        ({}, (400, "image", "required")),
        ({"images": [{"file_id": "file-1"}]}, (400, "image", "not_supported")),
        ({"image": 7}, (400, "image", "invalid_type")),
        ({"image": "\ud800"}, (400, "image", "invalid_type")),
        ({"image": "https://other.example.org/x.png"}, (400, "image", "download_failed")),
        ({"image": photo_base64(), "mask": "x"}, (400, "mask", "not_supported")),
    ):
        body = json.dumps(data | image)
        assert error_of(await gateway.http.post(EDITS, content=body)) == error


async def test_bodies_that_cannot_be_read_are_rejected(gateway: Gateway) -> None:
    for content_type, body, code in (
        ("application/json", b"[", "invalid_json"),
        ("multipart/form-data", b"--x--", "invalid_form"),
        ("multipart/form-data; boundary=x", b"--y\r\n", "invalid_form"),
        ("image/png", photo(form="PNG"), "unsupported_media_type"),
    ):
        response = await gateway.http.post(
            EDITS, content=body, headers={"Content-Type": content_type}
        )
        assert error_of(response) == (400, None, code)


async def test_generations_need_an_init_image(gateway: Gateway) -> None:
    response = await gateway.http.post("/v1/images/generations", json={"prompt": "a harbour"})
    assert error_of(response) == (400, "image", "required")
    assert "send it to /v1/images/edits" in response.json()["error"]["message"]


async def test_a_wrong_key_is_reported_before_anything_else(gateway: Gateway) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    error = (401, None, "invalid_api_key")
    for path, sent in (
        ("/v1/images/generations", {}),
        (EDITS, form(n="9")),
        (EDITS, form()),
        (EDITS, {"json": {"n": "x"}}),
    ):
        assert error_of(await gateway.http.post(path, headers=wrong, **sent)) == error
    assert error_of(await gateway.http.get("/v1/models", headers=wrong)) == error


async def test_models_are_listed_and_found(gateway: Gateway) -> None:
    model = {"id": "fake", "object": "model", "created": 0, "owned_by": "img2img"}
    listed = await gateway.http.get("/v1/models")
    assert listed.json() == {"object": "list", "data": [model]}
    assert (await gateway.http.get("/v1/models/fake")).json() == model
    error = (404, "model", "model_not_found")
    assert error_of(await gateway.http.get("/v1/models/org/other")) == error


async def test_a_stream_has_partial_images_and_the_image(gateway: Gateway) -> None:
    sent = form(
        stream="true",
        partial_images="2",
        n="2",
        num_inference_steps="10",
        strength="0.9",
        quality="low",
        response_format="url",
    )
    response = await gateway.http.post(EDITS, **sent)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["img2img-ignored-fields"] == "response_format, quality"
    *partial, first, second = events_of(response.text)
    expected = [("image_edit.partial_image", image, n) for n in (0, 1) for image in (0, 1)]
    found = [(e["type"], e["image_index"], e["partial_image_index"]) for e in partial]
    assert sorted(found) == sorted(expected)
    preview = pixels(partial[0]["b64_json"])
    assert f"{preview.width}x{preview.height}" == partial[0]["size"]
    assert (preview.format, partial[0]["output_format"]) == ("JPEG", "jpeg")
    for index, event in enumerate((first, second)):
        assert (event["type"], event["image_index"]) == ("image_edit.completed", index)
        assert pixels(event["b64_json"]).size == (256, 256)
        assert (event["size"], event["usage"]["total_tokens"]) == ("256x256", 0)
        assert "quality" in event["warning"]
        assert (await gateway.http.get(event["url"])).status_code == 200


async def test_a_stream_without_partial_images_has_the_image_only(gateway: Gateway) -> None:
    for more in ({}, {"partial_images": 0}):
        body = {"prompt": "a harbour", "image": photo_base64(), "stream": True, **more}
        [event] = events_of((await gateway.http.post(EDITS, json=body)).text)
        assert event["type"] == "image_edit.completed"


async def test_a_failed_job_is_an_error_that_is_not_repeated(gateway: Gateway) -> None:
    response = await gateway.http.post(EDITS, **form(prompt="fail:out of ink"))
    assert error_of(response) == (500, None, "engine_failed")
    assert response.headers["x-should-retry"] == "false"
    streamed = await gateway.http.post(EDITS, **form(prompt="fail:out of ink", stream="true"))
    assert events_of(streamed.text) == [{"type": "error", **response.json()}]


async def test_a_repeated_request_gets_the_same_job_and_images(gateway: Gateway) -> None:
    headers = {"Idempotency-Key": "order 7"}
    first, again = [
        await gateway.http.post(EDITS, headers=headers, **form(seed=...)) for _ in range(2)
    ]
    assert first.headers["img2img-job"] == again.headers["img2img-job"]
    assert first.json() == again.json()
    other = await gateway.http.post(EDITS, headers=headers, **form(prompt="another"))
    assert error_of(other) == (409, None, "request_id_reused")
    assert other.headers["x-should-retry"] == "false"


async def test_images_without_events_are_read_from_the_bucket(gateway: Gateway) -> None:
    headers = {"Idempotency-Key": "order 8"}
    sent = form(output_format="jpeg", n="2")
    await gateway.http.post(EDITS, headers=headers, **sent)
    gateway.stack.bus.events._logs.clear()  # as after events_retention_seconds
    response = await gateway.http.post(EDITS, headers=headers, **sent)
    assert response.json()["output_format"] == "png"
    formats = [pixels(each["b64_json"]).format for each in response.json()["data"]]
    assert formats == ["PNG", "PNG"]
    streamed = await gateway.http.post(
        EDITS, headers=headers, **form(output_format="jpeg", n="2", stream="true")
    )
    assert [event["output_format"] for event in events_of(streamed.text)] == ["png", "png"]


@pytest.mark.parametrize(
    ("path", "is_openai"),
    [
        ("/v1/images/edits", True),
        ("/v1/images", True),
        ("/v1/models", True),
        ("/v1/imagesets", False),
        ("/v1/jobs", False),
        ("/api/v6/realtime/img2img", False),
    ],
)
async def test_every_error_has_the_format_of_its_path(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, path: str, is_openai: bool
) -> None:
    know = "img2img_server.gateway.http.middleware.HeldBody.know"
    monkeypatch.setattr("img2img_server.gateway.http.middleware.log.error", lambda *_, **__: None)
    responses: list[httpx.Response] = []
    for error in (RuntimeError(), RequestError(ErrorKind.UNAVAILABLE)):
        monkeypatch.setattr(know, Mock(side_effect=error))
        responses.append(await gateway.http.put(path))
    monkeypatch.undo()
    responses.append(await gateway.http.put(f"{path}/nothing"))
    assert [each.status_code for each in responses] in ([500, 503, 404], [500, 503, 405])
    for each in responses:
        assert ("error" in each.json(), "reason" in each.json()) == (is_openai, not is_openai)


@asynccontextmanager
async def held_gateway() -> AsyncIterator[tuple[ServedGateway, Stack]]:
    async with served_gateway() as served:
        served.http.headers.update(KEY)
        yield served, served.stack


@pytest.mark.parametrize("stream", ["true", "false"])
async def test_a_job_whose_caller_leaves_is_cancelled(stream: str) -> None:
    async with held_gateway() as (gateway, stack):
        waiting = asyncio.create_task(gateway.http.post(EDITS, **form(stream=stream)))
        job = await running(stack)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stack.api.reaches(job.name, job_pb2.Job.STATE_CANCELLED)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_job_whose_caller_leaves_before_the_first_byte_is_cancelled(
    spec_version: str,
) -> None:
    request = httpx.Request("POST", f"{BASE}{EDITS}", headers=KEY, **form(stream="true"))
    messages = [{"type": "http.request", "body": request.read(), "more_body": False}]
    started: list[Message] = []

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        started.append(message)
        if spec_version == "2.4":  # From this version on, servers report that the client has left.
            raise OSError
        await asyncio.Event().wait()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": EDITS,
        "raw_path": EDITS.encode(),
        "query_string": b"",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 1),
        "server": ("img.example.com", 80),
    }
    async with running_stack(FakeEngine(hold_after=1)) as stack:
        config = settings(api_address=stack.api.address)
        async with connect(config) as channel:
            app = create_app(config, channel, stack.worker.blobs, asyncio.Event())
            await app(scope, receive, send)
            await stack.api.reaches("jobs/10000001", job_pb2.Job.STATE_CANCELLED)
    assert [each["type"] for each in started] == ["http.response.start"]


async def test_a_job_with_an_idempotency_key_waits_for_its_caller() -> None:
    async with held_gateway() as (gateway, stack):
        headers = {"Idempotency-Key": "order 9"}
        waiting = asyncio.create_task(gateway.http.post(EDITS, headers=headers, **form()))
        job = await running(stack)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        again = asyncio.create_task(gateway.http.post(EDITS, headers=headers, **form()))
        gateway.engine.release()
        assert (await again).headers["img2img-job"] == str(job.id)


async def test_a_gateway_that_stops_asks_its_callers_to_try_again() -> None:
    async with held_gateway() as (gateway, stack):
        waiting = asyncio.create_task(gateway.http.post(EDITS, **form()))
        job = await running(stack)
        gateway.stop.set()
        response = await waiting
        assert error_of(response) == (503, None, "unavailable")
        assert response.headers["retry-after"] == "1"
        await stack.api.reaches(job.name, job_pb2.Job.STATE_CANCELLED)


async def test_a_job_that_is_cancelled_elsewhere_is_an_error() -> None:
    engine = FakeEngine()
    async with (
        running_stack(engine) as stack,
        gateway_before(stack) as gateway,
    ):
        sent = form(prompt=f"{HOLD_PROMPT}a harbour")
        waiting = asyncio.create_task(gateway.http.post(EDITS, headers=KEY, **sent))
        job = await running(stack)
        await stack.api.cancel(job.name)
        response = await waiting
        assert error_of(response) == (409, None, "job_cancelled")
        assert response.headers["x-should-retry"] == "false"


async def running(stack: Stack) -> job_pb2.Job:
    """Returns the first job of the stack once it runs."""
    async with stack.bus.events.watch(10_000_001) as log:
        await anext(log)
    return await stack.api.reaches("jobs/10000001", job_pb2.Job.STATE_RUNNING)
