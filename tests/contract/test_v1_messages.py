"""The messages of errors below /v1 say what is wrong and what to do, and nothing that a request
has is ignored. ModelsLab's paths keep their own messages.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.http_stack import ENTERPRISE, Gateway, photo_base64, running_gateway
from tests.stack import photo, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}
JSON_PATHS = ("/v1/jobs", "/v1/jobs:estimate", "/v1/jobs/1:cancel", "/v1/jobs/1:token")
BODY_PATHS = (*JSON_PATHS, "/v1/uploads", "/v1/uploads/1:complete", "/v1/images/edits")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway({"api_config": settings(upload_bytes=2**20)}) as running:
        yield running


def message_of(answer: Any) -> str:
    """Returns the message of an error of /v1 or of OpenAI's API."""
    body = answer.json()
    return str(body["error"]["message"] if "error" in body else body["message"])


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models", "/v1/uploads/1", "/v1/capabilities"])
@pytest.mark.parametrize(
    ("query", "headers", "text"),
    [
        ("", {}, "No API key was sent: send it in the header Authorization"),
        ("?key=dev-key", {}, "it is never read from the query"),
        ("", {"Authorization": "Basic eA=="}, "No API key was sent"),
        ("", {"key": "wrong"}, "The API key is wrong: this service has no such key"),
        ("", {"key": "a b"}, "keys have at most 1024 printable ASCII characters and no spaces"),
        ("", {"key": "i2t_AAAA"}, "The token is wrong"),
    ],
)
async def test_a_missing_key_and_a_wrong_key_have_different_messages(
    path: str, query: str, headers: dict[str, str], text: str, gateway: Gateway
) -> None:
    answer = await gateway.http.get(path + query, headers=headers)
    assert answer.status_code == 401
    assert text in message_of(answer)


async def test_a_key_that_is_no_text_and_a_key_in_place_of_a_token_are_named(
    gateway: Gateway,
) -> None:
    answer = await gateway.http.post("/v1/jobs", json={"key": 5}, headers=KEY)
    assert (answer.status_code, message_of(answer)) == (401, "key must be a text")
    answer = await gateway.http.get("/v1/jobs/1/events?token=dev-key")
    assert (answer.status_code, answer.json()["reason"]) == (401, "INVALID_API_KEY")
    assert message_of(answer).startswith("token must be one that POST /v1/jobs/{id}:token made")


@pytest.mark.parametrize("path", BODY_PATHS)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": 1,\n "b" 2}', "not valid JSON: line 2, column 6: expecting ':' delimiter"),
        (b'{"a": 1} x', "not valid JSON: line 1, column 10: extra data"),
        (b'{"a": "\xff"}', "not valid JSON: the byte at position 7 is not UTF-8"),
        (b'{"a": {"b": 1, "b": 2}}', "not valid JSON: an object has the name 'b' twice"),
        (b"[" * 30_000, "not valid JSON: its values are nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON: a number has too many digits"),
        (b"[1]", "The body must be a JSON object, and it is a list"),
        (b"7.5", "The body must be a JSON object, and it is a number"),
        (b"[" + b"1," * 40_001 + b"1]", "The body must not have more than 40000 JSON values"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
async def test_a_body_that_is_no_json_object_is_named_with_the_place_of_its_fault(
    path: str, content: bytes, text: str, gateway: Gateway
) -> None:
    headers = KEY | {"Content-Type": "application/json"}
    answer = await gateway.http.post(path, content=content, headers=headers)
    assert answer.status_code == 400
    assert text in message_of(answer)


async def test_broken_json_is_named_although_curl_sends_another_content_type(
    gateway: Gateway,
) -> None:
    headers = KEY | {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await gateway.http.post("/v1/jobs", content=b'{"spec": {}', headers=headers)
    assert answer.json()["reason"] == "INVALID_JSON"
    assert "line 1, column 12: expecting ',' delimiter" in message_of(answer)


@pytest.mark.parametrize("path", BODY_PATHS)
async def test_a_body_of_another_kind_is_named_with_the_kinds_that_the_path_takes(
    path: str, gateway: Gateway
) -> None:
    answer = await gateway.http.post(path, content=b"a", headers=KEY | {"Content-Type": "text/xml"})
    assert answer.status_code == 400
    assert "This endpoint takes" in message_of(answer)
    assert message_of(answer).endswith("; the body is text/xml")
    answer = await gateway.http.post(path, content=b"a", headers=KEY | {"Content-Type": "?"})
    assert "This endpoint takes" in message_of(answer)


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/uploads", "/v1/images/edits"])
async def test_a_body_that_is_too_large_is_named_with_the_limit(
    path: str, gateway: Gateway
) -> None:
    headers = KEY | {"Content-Length": str(2**40), "Expect": "100-continue"}
    answer = await gateway.http.post(path, content=b"", headers=headers)
    assert answer.status_code == 413
    assert message_of(answer).startswith("The body must not be larger than 32 MiB")


@pytest.mark.parametrize(
    ("method", "path", "code", "text"),
    [
        ("GET", "/v1/jobs/1:cancel", 405, "This path takes POST"),
        ("PUT", "/v1/jobs", 405, "This path takes POST or GET"),
        ("GET", "/v1/images/edits", 405, "This path takes POST"),
        ("POST", "/v1/job", 404, "There is no such path: GET / lists the paths"),
        ("GET", "/v1", 404, "There is no such path: GET / lists the paths"),
        ("POST", "/v1/images/variations", 404, "There is no such path: GET / lists the paths"),
        ("GET", "/v1/models/nope", 404, "GET /v1/models lists those that are served"),
        ("GET", "/v1/jobs/77", 404, "jobs/77 was not found: its id is wrong"),
        ("POST", "/v1/jobs/77:cancel", 404, "it is one of another tenant, or it has expired"),
        ("GET", "/v1/uploads/77", 404, "There is no upload 77: its id is wrong"),
    ],
)
async def test_a_wrong_method_path_or_id_is_named_with_what_to_do(
    method: str, path: str, code: int, text: str, gateway: Gateway
) -> None:
    answer = await gateway.http.request(method, path, headers=KEY)
    assert answer.status_code == code
    assert text in message_of(answer)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/capabilities"),
        ("GET", "/v1/jobs"),
        ("GET", "/v1/jobs/1"),
        ("GET", "/v1/jobs/1/events"),
        ("GET", "/v1/uploads/1"),
        ("DELETE", "/v1/uploads/1"),
        *(("POST", path) for path in BODY_PATHS if "images" not in path),
    ],
)
async def test_a_parameter_that_a_call_does_not_have_is_refused_after_the_key(
    method: str, path: str, gateway: Gateway
) -> None:
    answer = await gateway.http.request(method, f"{path}?nope=1", headers=KEY)
    assert answer.status_code == 400
    assert {"nope"} <= set(answer.json()["errors"])
    answer = await gateway.http.request(method, f"{path}?api_key=1", headers=KEY)
    assert "a key is never read from the query" in answer.json()["errors"]["api_key"][0]
    wrong = await gateway.http.request(method, f"{path}?nope=1", headers={"key": "wrong"})
    assert wrong.status_code == 401


@pytest.mark.parametrize(
    "path", ["/v1/jobs/1:cancel", "/v1/jobs/1:token", "/v1/uploads/1:complete"]
)
async def test_a_field_that_a_call_does_not_have_is_refused(path: str, gateway: Gateway) -> None:
    answer = await gateway.http.post(path, json={"key": "dev-key", "force": True})
    assert (answer.status_code, message_of(answer)) == (400, "there is no field force")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/fake"])
async def test_openais_calls_name_parameters_without_effect(path: str, gateway: Gateway) -> None:
    answer = await gateway.http.get(f"{path}?api-version=2", headers=KEY)
    assert answer.headers["img2img-ignored-fields"] == "api-version"


async def test_an_edit_names_parameters_without_effect(gateway: Gateway) -> None:
    sent = {"prompt": "a", "image": photo_base64(), "response_format": "url"}
    path = "/v1/images/edits?api-version=2&strength=0.5"
    answer = await gateway.http.post(path, json=sent, headers=KEY)
    assert answer.headers["img2img-ignored-fields"] == "api-version, strength"
    assert "api-version" in answer.headers["img2img-warning"]


async def test_a_field_of_the_spec_outside_the_spec_is_named(gateway: Gateway) -> None:
    sent = {"prompt": "a", "strength": 0.5}
    answer = await gateway.http.post("/v1/jobs", json=sent, headers=KEY)
    assert message_of(answer) == (
        "there is no field prompt: it is a field of spec, so send it inside the object spec"
    )


async def test_a_field_in_both_spellings_is_refused(gateway: Gateway) -> None:
    image = {"data": photo_base64()}
    sent = {"spec": {"prompt": "a", "init_image": image, "initImage": image}}
    answer = await gateway.http.post("/v1/jobs", json=sent, headers=KEY)
    assert (answer.status_code, message_of(answer)) == (400, "init_image must be sent only once")


@pytest.mark.parametrize("kind", ["json", "form", "image"])
async def test_an_estimate_takes_what_a_job_takes(kind: str, gateway: Gateway) -> None:
    more: dict[str, Any] = {"json": {"spec": {"prompt": "a"}}}
    query = {"strength": "0.25", "samples": "3"}
    if kind == "form":
        more = {"files": {"init_image": ("a.png", photo()), "prompt": (None, "a")}}
    elif kind == "image":
        more = {"content": photo(), "headers": KEY | {"Content-Type": "image/png"}}
        query["prompt"] = "a"
    more = {"headers": KEY} | more
    answer = await gateway.http.post("/v1/jobs:estimate", params=query, **more)
    assert answer.status_code == 200, answer.text
    found = answer.json()["spec"]
    assert (found["prompt"], found["strength"], found["samples"]) == ("a", 0.25, 3)
    twice = query | {"request_id": "a"}
    answer = await gateway.http.post("/v1/jobs:estimate", params=twice, **more)
    assert answer.json()["errors"] == {"request_id": ["there is no field request_id"]}


@pytest.mark.parametrize(
    ("path", "sent", "code", "text"),
    [
        ("/img2img", b"{", 400, "Invalid JSON body"),
        ("/img2img", b'{"key": 5}', 401, "Invalid API key"),
        ("/img2img", b"{}", 401, "Invalid API key"),
        ("/img2img", b'{"key": "wrong"}', 401, "Invalid API key"),
        ("/fetch/77", b'{"key": "dev-key"}', 404, "Request not found"),
        ("/nope", b"{}", 404, "Not found"),
    ],
)
async def test_modelslabs_paths_keep_their_messages(
    path: str, sent: bytes, code: int, text: str, gateway: Gateway
) -> None:
    answer = await gateway.http.post(ENTERPRISE + path, content=sent)
    assert (answer.status_code, message_of(answer)) == (code, text)
    answer = await gateway.http.delete(f"{ENTERPRISE}/img2img")
    assert (answer.status_code, message_of(answer)) == (405, "Method not allowed")
