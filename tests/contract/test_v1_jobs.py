"""/v1/jobs: forms and images as bodies, parameters in the query, lists, and reasons of fields."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import jsonschema_rs
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from img2img.v1 import job_pb2
from img2img_server.testing.fake_engine import FakeEngine
from tests.http_stack import Gateway, gateway_before, photo_base64, running_gateway
from tests.stack import photo, spec

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}
FIELDS = {
    "prompt": "a harbour at dusk",
    "width": "256",
    "height": "256",
    "samples": "2",
    "seed": str(2**62),
    "strength": "0.5",
    "safety_checker": "false",
    "output_format": "IMAGE_FORMAT_WEBP",
    "annotations": '{"order": "7"}',
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


async def by_json(http: httpx.AsyncClient, fields: dict[str, str]) -> httpx.Response:
    values: dict[str, Any] = dict(fields)
    values["annotations"] = json.loads(values["annotations"])
    values["safety_checker"] = values["safety_checker"] == "true"
    sent = {"spec": values | {"init_image": {"data": photo_base64()}}}
    return await http.post("/v1/jobs", json=sent, headers=KEY)


async def by_form(http: httpx.AsyncClient, fields: dict[str, str]) -> httpx.Response:
    files = {"init_image": ("photo.png", photo())}
    return await http.post("/v1/jobs", data=fields, files=files, headers=KEY)


async def by_image(http: httpx.AsyncClient, fields: dict[str, str]) -> httpx.Response:
    headers = KEY | {"Content-Type": "image/png"}
    return await http.post("/v1/jobs", params=fields, content=photo(), headers=headers)


async def test_a_form_and_an_image_create_the_job_that_json_creates(gateway: Gateway) -> None:
    found = []
    for send in (by_json, by_form, by_image):
        answer = await send(gateway.http, FIELDS)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["job"]["spec"])
    assert found[0]["seed"] == FIELDS["seed"]
    assert found[0]["annotations"] == {"order": "7"}
    assert (found[0]["safety_checker"], found[0]["samples"]) == (False, 2)
    assert found[1] == found[0]
    assert found[2] == found[0]


async def test_the_image_of_a_form_is_the_one_that_is_used(gateway: Gateway) -> None:
    # The size of the result follows the aspect ratio of the init image.
    files = {"init_image": ("photo.png", photo(96, 48))}
    answer = await gateway.http.post("/v1/jobs", data={"prompt": "a"}, files=files, headers=KEY)
    wide = answer.json()["job"]["spec"]
    assert wide["width"] > 1.5 * wide["height"]


@pytest.mark.parametrize("place", ["form", "query", "json"])
async def test_texts_of_the_init_image_are_urls_data_uris_and_base64(
    place: str, gateway: Gateway
) -> None:
    for text in (photo_base64(), f"data:image/png;base64,{photo_base64()}"):
        texts = {"prompt": "a", "init_image": text}
        if place == "form":
            files = {name: (None, value) for name, value in texts.items()}
            answer = await gateway.http.post("/v1/jobs", files=files, headers=KEY)
        elif place == "query":
            answer = await gateway.http.post("/v1/jobs", params=texts, headers=KEY)
        else:  # A data URI is a URL in JSON, too.
            image = {"url": text} if text.startswith("data:") else {"data": text}
            sent = {"spec": texts | {"init_image": image}}
            answer = await gateway.http.post("/v1/jobs", json=sent, headers=KEY)
        assert answer.status_code == 200, answer.text


async def test_an_empty_text_equals_an_absent_field(gateway: Gateway) -> None:
    fields = dict.fromkeys(("strength", "seed", "model", "lane", "annotations", "request_id"), "")
    answer = await by_form(gateway.http, {"prompt": "a"} | fields)
    assert answer.status_code == 200, answer.text


async def test_the_same_request_id_gives_the_same_job_for_every_kind_of_body(
    gateway: Gateway,
) -> None:
    request_id = str(uuid.uuid4())
    fields = FIELDS | {"request_id": request_id}
    first, second = await by_form(gateway.http, fields), await by_image(gateway.http, fields)
    assert first.json()["job"]["id"] == second.json()["job"]["id"]
    assert first.headers["x-request-id"] == request_id


@pytest.mark.parametrize("place", ["header", "form", "query"])
async def test_the_key_of_a_form_is_in_a_header_or_a_field(place: str, gateway: Gateway) -> None:
    files = {"init_image": ("photo.png", photo())}
    for key, code in (("dev-key", 200), ("wrong", 401)):
        answer = await gateway.http.post(
            "/v1/jobs",
            data={"prompt": "a"} | ({"key": key} if place == "form" else {}),
            files=files,
            params={"key": key} if place == "query" else {},
            headers={"X-API-Key": key} if place == "header" else {},
        )
        assert answer.status_code == (401 if place == "query" else code)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"strength": "strong"}, {"strength": "INVALID_TYPE"}),
        ({"strength": "2", "width": "100"}, {"width": "OUT_OF_RANGE", "strength": "OUT_OF_RANGE"}),
        ({"prompt": ""}, {"prompt": "REQUIRED"}),
        ({"base64": "perhaps"}, {"base64": "INVALID_TYPE"}),
        ({"lane": "FAST"}, {"lane": "NOT_SUPPORTED"}),
        ({"annotations": "[]"}, {"annotations": "INVALID_TYPE"}),
        ({"annotations": "{" * 20_000}, {"annotations": "INVALID_TYPE"}),
        ({"strenght": "0.5"}, {"strenght": "UNKNOWN_FIELD"}),
        ({"a b": "0.5"}, {"body": "UNKNOWN_FIELD"}),
        ({"init_image": "https://files.example.org/a.png"}, {"init_image": "TOO_MANY"}),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("send", [by_form, by_image])
async def test_wrong_fields_are_reported_with_their_reasons(
    send: Any, fields: dict[str, str], wrong: dict[str, str], gateway: Gateway
) -> None:
    answer = await send(gateway.http, {"prompt": "a"} | fields)
    assert answer.status_code == 400, answer.text
    found = {each["field"]: each["reason"] for each in answer.json()["violations"]}
    assert found == wrong


async def test_a_field_that_is_sent_twice_is_refused(gateway: Gateway) -> None:
    files = [("prompt", (None, "a")), ("prompt", (None, "b")), ("init_image", ("a", photo()))]
    twice = [
        await gateway.http.post("/v1/jobs", files=files, headers=KEY),
        await gateway.http.post("/v1/jobs", files=files[1:], params={"prompt": "a"}, headers=KEY),
        await gateway.http.post(
            "/v1/jobs",
            params={"negativePrompt": "a"},
            json={"spec": {"negative_prompt": "b"}},
            headers=KEY,
        ),
    ]
    for answer in twice:
        assert answer.status_code == 400
        [violation] = answer.json()["violations"]
        assert violation["reason"] == "TOO_MANY"


@pytest.mark.parametrize("text", [b"\xff\xfe", "ü".encode("latin-1")], ids=["bytes", "latin-1"])
async def test_a_text_that_is_not_utf_8_is_refused(text: bytes, gateway: Gateway) -> None:
    files = {"prompt": (None, text), "init_image": ("photo.png", photo())}
    answer = await gateway.http.post("/v1/jobs", files=files, headers=KEY)
    assert answer.json()["errors"] == {"prompt": ["prompt must be text in UTF-8"]}


@pytest.mark.parametrize("media_type", ["application/xml", "application/octet-stream"])
async def test_another_kind_of_body_is_refused_with_the_kinds_that_are_accepted(
    media_type: str, gateway: Gateway
) -> None:
    headers = KEY | {"Content-Type": media_type}
    answer = await gateway.http.post("/v1/jobs", content=photo(), headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (400, "UNSUPPORTED_MEDIA_TYPE")
    for accepted in ("application/json", "multipart/form-data", "image/*", media_type):
        assert accepted in answer.json()["message"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "REQUIRED"), (b"GIF89a", "INVALID_IMAGE"), (photo()[:-300], "INVALID_IMAGE")],
    ids=["empty", "gif", "cut"],
)
async def test_a_body_that_is_no_complete_image_is_a_wrong_init_image(
    content: bytes, reason: str, gateway: Gateway
) -> None:
    headers = KEY | {"Content-Type": "image/png"}
    answer = await gateway.http.post(
        "/v1/jobs", params={"prompt": "a"}, content=content, headers=headers
    )
    assert answer.status_code == 400
    [violation] = answer.json()["violations"]
    assert (violation["field"], violation["reason"]) == ("init_image", reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "", "strength": 2.0, "width": 100},
        {"width": 513, "samples": 9},
        {"scheduler": "nope"},
        {"prompt": "x" * 2001, "webhook": "ftp://a"},
        {"init_image": {"data": b"GIF89a"}},
        {"init_image": {"url": "ftp://a"}},
    ],
    ids=str,
)
async def test_the_reasons_of_fields_are_those_of_grpc(
    changes: dict[str, Any], gateway: Gateway
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stack.api.create(spec(**changes))
    status = rpc_status.from_call(refused.value)
    assert status is not None
    bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    for detail in status.details:
        detail.Unpack(bad)
        detail.Unpack(info)
    texts: dict[str, Any] = {"prompt": "a harbour"} | changes
    image = texts.pop("init_image", {"data": photo()})
    if "data" in image:
        answer = await gateway.http.post(
            "/v1/jobs", data=texts, files={"init_image": ("a", image["data"])}, headers=KEY
        )
    else:
        sent = {"spec": texts | {"init_image": image}}
        answer = await gateway.http.post("/v1/jobs", json=sent, headers=KEY)
    body = answer.json()
    over_grpc = [(each.field, each.reason, each.description) for each in bad.field_violations]
    over_http = [(each["field"], each["reason"], each["message"]) for each in body["violations"]]
    assert (answer.status_code, body["reason"]) == (400, info.reason)
    assert sorted(over_http) == sorted(over_grpc)
    limits = {
        f"{each['field']}_{name}": value
        for each in body["violations"]
        for name, value in each["values"].items()
    }
    others = {name for name in info.metadata if name == "fields" or name.endswith("_cause")}
    assert limits == {name: text for name, text in info.metadata.items() if name not in others}


async def test_the_document_has_every_field_of_forms_and_of_the_query(gateway: Gateway) -> None:
    document = (await gateway.http.get("/openapi.json")).json()
    operation, schemas = document["paths"]["/v1/jobs"]["post"], document["components"]["schemas"]
    bodies = operation["requestBody"]["content"]
    assert set(bodies) == {"application/json", "multipart/form-data", "image/*"}
    [query] = [each for each in operation["parameters"] if each["in"] == "query"]
    fields = {field.name for field in job_pb2.JobSpec.DESCRIPTOR.fields}
    fields |= {"request_id", "upload"}
    form = bodies["multipart/form-data"]["schema"]["$ref"].rpartition("/")[2]
    assert set(schemas[form]["properties"]) == fields | {"key"}
    assert set(schemas[query["schema"]["$ref"].rpartition("/")[2]]["properties"]) == fields
    validator = jsonschema_rs.validator_for(schemas[form])
    typed = {"prompt": "a", "init_image": "a", "width": 256, "seed": str(2**62), "strength": 1.0}
    assert validator.is_valid(typed | {"lane": "LANE_BATCH", "base64": True})
    assert not validator.is_valid(typed | {"strength": 1.1})
    assert not validator.is_valid(typed | {"strenght": 1.0})


async def test_errors_have_reasons_in_legacy_mode_too(gateway: Gateway) -> None:
    async with gateway_before(gateway.stack, legacy=True) as old:
        answer = await by_image(old.http, {"prompt": "a", "strength": "2"})
        assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID_REQUEST")
        assert answer.json()["violations"][0]["reason"] == "OUT_OF_RANGE"
        unknown = await old.http.get("/v1/jobs/10000999", headers=KEY)
        assert (unknown.status_code, unknown.json()["reason"]) == (404, "JOB_NOT_FOUND")
        unknown = await old.http.get("/v1/nowhere", headers=KEY)
        assert (unknown.status_code, unknown.json()["reason"]) == (404, "PATH_NOT_FOUND")


async def test_the_errors_of_the_http_contract_have_no_violations(gateway: Gateway) -> None:
    answer = await gateway.create(strength=2)
    assert set(answer.json()) == {"status", "message", "reason", "errors"}


async def test_lists_have_pages_and_states() -> None:
    engine = FakeEngine(hold_after=1)
    async with running_gateway({"engine": engine}) as gateway:

        async def page(**parameters: Any) -> dict[str, Any]:
            answer = await gateway.http.get("/v1/jobs", params=parameters, headers=KEY)
            assert answer.status_code == 200, answer.text
            body: dict[str, Any] = answer.json()
            return body

        made = [(await by_form(gateway.http, FIELDS)).json()["job"]["id"] for _ in range(5)]
        first = await page(page_size=2)
        assert [job["id"] for job in first["jobs"]] == made[:2:-1]
        second = await page(page_size=2, page_token=first["next_page_token"])
        assert [job["id"] for job in second["jobs"]] == made[2:0:-1]
        third = await page(page_size=2, page_token=second["next_page_token"])
        assert [job["id"] for job in third["jobs"]] == made[:1]
        assert third["next_page_token"] == ""
        await gateway.http.post(f"/v1/jobs/{made[-1]}:cancel", headers=KEY)
        await gateway.http.get(f"/v1/jobs/{made[-1]}/events", headers=KEY)
        cancelled = await page(states="STATE_CANCELLED")
        assert [job["id"] for job in cancelled["jobs"]] == made[-1:]
        others = await page(states=["STATE_QUEUED", "STATE_RUNNING"])
        assert [job["id"] for job in others["jobs"]] == made[-2::-1]
        engine.release()


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("page_size=0", ("page_size", "OUT_OF_RANGE")),
        ("page_size=101", ("page_size", "OUT_OF_RANGE")),
        ("page_size=-1", ("page_size", "OUT_OF_RANGE")),
        ("page_size=two", ("page_size", "INVALID_TYPE")),
        ("page_size=", ("page_size", "INVALID_TYPE")),
        ("page_size=1&page_size=2", ("page_size", "TOO_MANY")),
        ("page_token=x", ("page_token", "INVALID_FORMAT")),
        ("states=queued", ("states", "NOT_SUPPORTED")),
        ("states=STATE_UNSPECIFIED", ("states", "NOT_SUPPORTED")),
        ("states=", ("states", "NOT_SUPPORTED")),
        ("state=STATE_QUEUED", ("state", "UNKNOWN_FIELD")),
        ("request_id=%C3%BC", ("request_id", "INVALID_FORMAT")),
    ],
)
async def test_wrong_parameters_of_a_list_are_refused(
    query: str, wrong: tuple[str, str], gateway: Gateway
) -> None:
    answer = await gateway.http.get(f"/v1/jobs?{query}", headers=KEY)
    assert answer.status_code == 400, answer.text
    [violation] = answer.json()["violations"]
    assert (violation["field"], violation["reason"]) == wrong
    answer = await gateway.http.get(f"/v1/jobs?{query}", headers={"X-API-Key": "wrong"})
    assert answer.status_code == 401
