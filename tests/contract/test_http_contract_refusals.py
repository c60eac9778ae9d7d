"""Paths, keys, the order of checks and errors (docs/http-contract.md#errors)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from img2img_server.errors import PermissionDeniedError
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.http_stack import (
    ENTERPRISE,
    V6,
    Gateway,
    body,
    error_body,
    fetch_photo,
    gateway_before,
    legacy,
    legacy_error_body,
    photo_base64,
    today,
)
from tests.stack import Stack, photo, running_api, running_worker, two_tenants

__all__ = ["legacy", "today"]
pytestmark = pytest.mark.asyncio(loop_scope="module")
CREATE = f"{ENTERPRISE}/img2img"
BAD_KEY = {"status": "error", "message": "Invalid API key", "reason": "INVALID_API_KEY"}


# Keys.


@pytest.mark.parametrize(
    ("rule", "key", "headers"),
    [
        ("the body's key", "dev-key", {}),
        ("a bearer token", ..., {"Authorization": "Bearer dev-key"}),
        ("the scheme in any case", ..., {"Authorization": "bearer dev-key"}),
        ("header key", ..., {"key": "dev-key"}),
        ("header X-API-Key", ..., {"X-API-Key": "dev-key"}),
        ("the body before a header", "dev-key", {"key": "wrong"}),
        ("bearer before key", ..., {"Authorization": "Bearer dev-key", "key": "wrong"}),
        ("key before X-API-Key", ..., {"key": "dev-key", "X-API-Key": "wrong"}),
        ("an empty key of the body is passed over", "", {"key": "dev-key"}),
        ("a null key of the body is passed over", None, {"X-API-Key": "dev-key"}),
        (
            "an empty bearer token is passed over",
            ...,
            {"Authorization": "Bearer ", "key": "dev-key"},
        ),
        ("another scheme is passed over", ..., {"Authorization": "Basic eA==", "key": "dev-key"}),
    ],
)
async def test_a_key_is_found(
    rule: str, key: Any, headers: dict[str, str], today: Gateway, legacy: Gateway
) -> None:
    for gateway in (today, legacy):
        answer = await gateway.http.post(CREATE, json=body(key=key), headers=headers)
        assert (rule, answer.json()["status"]) == (rule, "success")


@pytest.mark.parametrize(
    ("rule", "key", "headers", "query"),
    [
        ("no key", ..., {}, ""),
        ("a wrong key", "wrong", {}, ""),
        ("a later key does not rescue a wrong one", "wrong", {"key": "dev-key"}, ""),
        ("a wrong bearer token counts", ..., {"Authorization": "Bearer x", "key": "dev-key"}, ""),
        ("a key that is no string", 5, {"key": "dev-key"}, ""),
        ("a key that is false", False, {"key": "dev-key"}, ""),
        ("the query string is never read", ..., {}, "?key=dev-key"),
        ("a key beyond ASCII", "schlüssel", {}, ""),
        ("a key of control characters", "dev-key\n", {}, ""),
        ("a key with a lone surrogate", "\ud800", {}, ""),
        ("a key of a megabyte", "k" * 2**20, {}, ""),
    ],
)
async def test_anything_else_is_a_wrong_key(
    rule: str, key: Any, headers: dict[str, str], query: str, today: Gateway, legacy: Gateway
) -> None:
    sent = json.dumps(body(key=key))
    answer = await today.http.post(CREATE + query, content=sent, headers=headers)
    assert (rule, answer.status_code, answer.json()) == (rule, 401, BAD_KEY)
    answer = await legacy.http.post(CREATE + query, content=sent, headers=headers)
    reported = answer.json()
    assert (answer.status_code, reported["status"], reported["message"]) == (
        200,
        "error",
        "Invalid Api Key",
    )
    assert reported["messege"] == reported["message"]
    assert isinstance(reported["tip"], str)


async def test_jobs_belong_to_the_tenant_of_the_key(tmp_path: Path) -> None:
    ring, key_a, key_b = two_tenants(tmp_path)
    bus = memory_bus()
    async with (
        running_worker(bus) as worker,
        running_api(bus, fetch=fetch_photo, keys=ring) as api,
        gateway_before(Stack(bus, api, worker)) as gateway,
    ):
        job_id = (await gateway.create(key=key_a)).json()["id"]
        assert (await gateway.fetch(job_id, key=key_a)).status_code == 200
        assert (await gateway.fetch(job_id, key=key_b)).status_code == 404
        unsafe = await gateway.create(key=key_b, safety_checker=False)
        assert (unsafe.status_code, unsafe.json()) == (
            403,
            error_body("PERMISSION_DENIED", str(PermissionDeniedError("unsafe"))),
        )


# Limits of request bodies.


@pytest.mark.parametrize(
    "sent",
    [b"{", b"[]", b'"x"', b"5", b"null", b"\xff\xfe\x00", b"key=dev-key", b"[" * 100_000, b"{}x"],
    ids=lambda sent: repr(sent[:12]),
)
async def test_a_body_that_is_no_json_object_is_reported_before_the_key(
    sent: bytes, today: Gateway, legacy: Gateway
) -> None:
    answer = await today.http.post(CREATE, content=sent)
    message = "Invalid JSON body"
    assert (answer.status_code, answer.json()) == (400, error_body("INVALID_JSON", message))
    answer = await legacy.http.post(CREATE, content=sent)
    assert (answer.status_code, answer.json()) == (200, legacy_error_body(message))


@pytest.mark.parametrize(
    ("content_type", "sent"),
    [
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="key"'),
        ("application/x-www-form-urlencoded", b"key=dev-key&prompt=a"),
        ("image/png", photo(form="PNG")),
    ],
)
async def test_a_body_of_another_kind_has_a_reason_of_its_own(
    content_type: str, sent: bytes, today: Gateway, legacy: Gateway
) -> None:
    headers = {"Content-Type": content_type}
    message, reason = "Invalid JSON body", "UNSUPPORTED_MEDIA_TYPE"
    answer = await today.http.post(CREATE, content=sent, headers=headers)
    assert (answer.status_code, answer.json()) == (400, error_body(reason, message))
    answer = await legacy.http.post(CREATE, content=sent, headers=headers)
    assert (answer.status_code, answer.json()) == (200, legacy_error_body(message))
    answer = await today.http.post("/v1/jobs/1:cancel", content=sent, headers=headers)
    media_type = content_type.partition(";")[0]
    message = f"This endpoint takes application/json; the body is {media_type}"
    assert (answer.status_code, answer.json()) == (400, error_body(reason, message))


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_the_body_is_json_whatever_content_type_says(
    content_type: str, today: Gateway, legacy: Gateway
) -> None:
    for gateway in (today, legacy):
        answer = await gateway.http.post(
            CREATE, content=json.dumps(body()), headers={"Content-Type": content_type}
        )
        assert answer.json()["status"] == "success"


@pytest.mark.parametrize("sent", [b"", b" \n"])
async def test_an_empty_body_is_an_empty_object(
    sent: bytes, today: Gateway, legacy: Gateway
) -> None:
    answer = await today.http.post(CREATE, content=sent, headers={"key": "dev-key"})
    assert answer.json()["errors"] == {
        "prompt": ["prompt is required"],
        "init_image": ["init_image is required"],
    }
    answer = await legacy.http.post(CREATE, content=sent, headers={"key": "dev-key"})
    assert answer.json()["message"] == {
        "prompt": ["The prompt field is required."],
        "init_image": ["The init_image field is required."],
    }


async def test_a_body_over_32_mb_is_refused_and_one_of_32_mb_is_not(
    today: Gateway, legacy: Gateway
) -> None:
    limit = 32 * 2**20
    filled = json.dumps(body(key="wrong", unknown="")).encode()
    exact = filled[:-2] + b"x" * (limit - len(filled)) + filled[-2:]
    assert len(exact) == limit
    assert (await today.http.post(CREATE, content=exact)).status_code == 401
    message = "Request body too large"
    answer = await today.http.post(CREATE, content=exact + b" ")
    assert (answer.status_code, answer.json()) == (413, error_body("BODY_TOO_LARGE", message))
    answer = await legacy.http.post(CREATE, content=exact + b" ")
    assert (answer.status_code, answer.json()) == (200, legacy_error_body(message))


async def test_a_body_without_announced_length_is_counted(today: Gateway) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(33):
            yield b" " * 2**20

    answer = await today.http.post(CREATE, content=chunks())
    assert answer.status_code == 413


# Order of checks.


async def test_a_wrong_key_is_reported_before_wrong_fields(today: Gateway) -> None:
    answer = await today.create(key="wrong", width="wide")
    assert (answer.status_code, answer.json()) == (401, BAD_KEY)


async def test_a_wrong_key_is_reported_before_an_unknown_id(today: Gateway) -> None:
    for job_id in ("abc", "10000999"):
        assert (await today.fetch(job_id, key="wrong")).status_code == 401
    sent = {"key": "wrong"}
    assert (await today.http.post("/api/v6/images/fetch", json=sent)).status_code == 401


async def test_wrong_fields_are_reported_before_the_image_is_looked_at(today: Gateway) -> None:
    answer = await today.create(width=1, init_image="https://nowhere.example/x.png")
    assert list(answer.json()["errors"]) == ["width"]


# The init image.

NOT_AN_IMAGE = "init_image is not a valid PNG, JPG or WebP image"


@pytest.mark.parametrize(
    ("sent", "text", "cause"),
    [
        ("https://nowhere.example/x.png", "Unable to fetch image from provided URL", ""),
        (
            "not base64!",
            NOT_AN_IMAGE,
            "the data is plain text, not an image; send a PNG, JPEG or "
            "WebP image, or its URL with http:// or https://",
        ),
        ("data:image/png,abc", NOT_AN_IMAGE, "the data is plain text, not an image"),
        ("R0lGODlhAQABAAAAACw=", NOT_AN_IMAGE, "the data is a GIF image"),
        (photo_base64()[:400], NOT_AN_IMAGE, "the JPEG image cannot be used: it is cut off"),
    ],
)
async def test_an_image_that_cannot_be_used_is_reported(
    sent: str, text: str, cause: str, today: Gateway, legacy: Gateway
) -> None:
    answer = await today.create(init_image=sent)
    [why] = answer.json()["errors"]["init_image"]
    assert (answer.status_code, answer.json()["message"]) == (400, text)
    assert why.startswith(f"{text}: {cause}" if cause else text)
    answer = await legacy.create(init_image=sent)
    sentence = f"The {text}." if text.startswith("init_image") else f"{text}."
    assert (answer.status_code, answer.json()["message"]) == (200, {"init_image": [sentence]})


async def test_an_image_over_20_mb_is_reported(today: Gateway) -> None:
    answer = await today.create(init_image="A" * (4 * 20_971_521 // 3 + 4))
    assert answer.json()["message"] == "init_image must not be larger than 20 MB"


# Limits and faults.


async def test_the_queue_limit_is_429_with_when_to_come_back() -> None:
    bus = memory_bus(queue_limit=2)
    async with (
        running_worker(bus, FakeEngine(hold_after=1)) as worker,
        running_api(bus, fetch=fetch_photo) as api,
        gateway_before(Stack(bus, api, worker)) as gateway,
        gateway_before(Stack(bus, api, worker), legacy=True) as old,
    ):
        for _ in range(2):
            assert (await gateway.create(instant_response=1)).json()["status"] == "processing"
        answer = await gateway.create()
        reported = answer.json()
        assert (answer.status_code, reported["status"], reported["message"]) == (
            429,
            "error",
            "Rate limit exceeded. Maximum 2 queued requests allowed.",
        )
        assert reported["retry_after"] >= 1
        assert answer.headers["retry-after"] == str(reported["retry_after"])
        answer = await old.create()
        reported = answer.json()
        assert (
            answer.status_code,
            reported["status"],
            reported["message"],
            reported["messege"],
        ) == (
            200,
            "error",
            "Rate limit exceeded",
            "Rate limit exceeded",
        )
        assert isinstance(reported["tips"], str)
        assert answer.headers["retry-after"] == str(reported["retry_after"])


async def test_an_api_that_is_away_is_503_with_retry_after(today: Gateway) -> None:
    gone = "127.0.0.1:1"
    async with (
        gateway_before(today.stack, address=gone) as gateway,
        gateway_before(today.stack, address=gone, legacy=True) as old,
    ):
        message = "Service temporarily unavailable. Please try again later."
        calls = gateway.create(), gateway.create(width=1), gateway.fetch(10000001), old.create()
        *answers, answer = await asyncio.gather(*calls)
        for each in answers:
            assert (each.status_code, each.json()) == (503, error_body("UNAVAILABLE", message))
            assert int(each.headers["retry-after"]) >= 1
        expected = legacy_error_body(message)
        assert (answer.status_code, answer.json()) == (200, expected)
        assert int(answer.headers["retry-after"]) >= 1


class BrokenBlobs(MemoryBlobStore):
    """A store that raises an unexpected error."""

    async def prove_readable(self) -> None:
        raise TypeError("a fault")


async def test_a_fault_of_ours_is_500_and_names_nothing(today: Gateway) -> None:
    with capture_logs() as logs:
        async with (
            gateway_before(today.stack, blobs=BrokenBlobs()) as gateway,
            gateway_before(today.stack, blobs=BrokenBlobs(), legacy=True) as old,
        ):
            answers = [await each.http.get("/readyz") for each in (gateway, old)]
    broken = [line for line in logs if line["event"] == "http_request_failed"]
    assert [str(line["exc_info"]) for line in broken] == ["a fault", "a fault"]
    message = "Internal server error. Please try again."
    assert (answers[0].status_code, answers[0].json()) == (500, error_body("INTERNAL", message))
    assert answers[0].headers["access-control-allow-origin"] == "*"
    expected = legacy_error_body(message)
    assert (answers[1].status_code, answers[1].json()) == (200, expected)


# Routes.


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api",
        f"{ENTERPRISE}/text2img",
        f"{V6}/inpainting",
        f"{ENTERPRISE}/fetch",
        f"{ENTERPRISE}/fetch/1/2",
        "/api/v6/realtime/IMG2IMG",
    ],
)
async def test_other_paths_are_404(path: str, today: Gateway, legacy: Gateway) -> None:
    answer = await today.http.post(path, json=body())
    assert (answer.status_code, answer.json()) == (404, error_body("PATH_NOT_FOUND", "Not found"))
    answer = await legacy.http.post(path, json=body())
    assert (answer.status_code, answer.json()) == (404, legacy_error_body("Not found"))


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CREATE, "POST, OPTIONS"),
        ("PUT", f"{V6}/img2img", "POST, OPTIONS"),
        ("DELETE", f"{V6}/fetch/1", "GET, POST, OPTIONS"),
        ("GET", "/api/v6/images/fetch", "POST, OPTIONS"),
        ("POST", "/generations/x.png", "GET, HEAD, OPTIONS"),
    ],
)
async def test_other_methods_are_405_with_allow(
    method: str, path: str, allow: str, today: Gateway, legacy: Gateway
) -> None:
    for gateway in (today, legacy):
        answer = await gateway.http.request(method, path)
        assert (answer.status_code, answer.json()["status"]) == (405, "error")
        assert sorted(answer.headers["allow"].split(", ")) == sorted(allow.split(", "))


@pytest.mark.parametrize(
    "path", [f"{CREATE}/", f"/{CREATE}", f"{V6}//img2img", "//api//v6/realtime/img2img//"]
)
async def test_slashes_too_many_are_answered_in_place(
    path: str, today: Gateway, legacy: Gateway
) -> None:
    for gateway in (today, legacy):
        answer = await gateway.http.post(f"http://img.example.com{path}", json=body())
        assert (answer.status_code, answer.json()["status"]) == (200, "success")


async def test_every_answer_is_json_with_a_string_status(today: Gateway, legacy: Gateway) -> None:
    for gateway in (today, legacy):
        for answer in (
            await gateway.create(),
            await gateway.create(width=1),
            await gateway.create(key="x"),
            await gateway.fetch(1),
            await gateway.http.post("/nowhere"),
            await gateway.http.get(CREATE),
            await gateway.http.post(CREATE, content=b"{"),
        ):
            assert answer.headers["content-type"] == "application/json"
            assert isinstance(answer.json()["status"], str)


async def test_repeating_a_post_makes_a_new_job(today: Gateway, legacy: Gateway) -> None:
    made = [await gateway.create() for gateway in (today, legacy) for _ in range(2)]
    assert len({answer.json()["id"] for answer in made}) == 4


async def test_error_bodies_never_repeat_the_key(today: Gateway, legacy: Gateway) -> None:
    key = "a-key-that-nobody-has"
    for gateway in (today, legacy):
        for answer in (await gateway.create(key=key), await gateway.fetch(key, key=key)):
            assert key not in answer.text
