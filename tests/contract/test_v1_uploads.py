"""Uploads over HTTP: the kinds of bodies, jobs that name an upload, errors, and the document."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
import pytest_asyncio

from img2img_server.errors import UploadNotFoundError
from tests.http_stack import Gateway, running_gateway
from tests.stack import photo, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}
IMAGE = photo(96, 64)
HASH = hashlib.sha256(IMAGE).hexdigest()
TEXT = base64.b64encode(IMAGE).decode()
MOST_BYTES = 60_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway({"api_config": settings(upload_bytes=MOST_BYTES)}) as running:
        yield running


async def uploaded(gateway: Gateway, image: bytes = IMAGE) -> dict[str, Any]:
    headers = KEY | {"Content-Type": "image/jpeg"}
    answer = await gateway.http.post("/v1/uploads", content=image, headers=headers)
    assert answer.status_code == 200, answer.text
    upload: dict[str, Any] = answer.json()["upload"]
    return upload


@pytest.mark.parametrize(
    "sent",
    [
        {"content": IMAGE, "headers": {"Content-Type": "image/png"}},
        {"files": {"image": ("cat.jpg", IMAGE)}},
        {"files": {"image": (None, TEXT)}},
        {"files": {"image": ("cat.jpg", IMAGE), "sha256": (None, HASH)}},
        {"json": {"image": TEXT}},
        {"json": {"image": f"data:image/jpeg;base64,{TEXT}"}},
        {"json": {"image": TEXT, "sha256": HASH.upper(), "size_bytes": len(IMAGE)}},
    ],
    ids=["image", "file", "text", "file and hash", "base64", "data URI", "with hash and size"],
)
async def test_each_kind_of_body_stores_the_image(sent: dict[str, Any], gateway: Gateway) -> None:
    headers = KEY | sent.pop("headers", {}) if "headers" in sent else KEY
    answer = await gateway.http.post("/v1/uploads", headers=headers, **sent)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    upload = body["upload"]
    assert (upload["sha256"], upload["size_bytes"]) == (HASH, str(len(IMAGE)))
    assert (upload["media_type"], upload["complete"]) == ("image/jpeg", True)
    assert body["put_url"] == ""
    found = await gateway.http.get(f"/v1/{upload['name']}", headers=KEY)
    assert found.json()["upload"] == upload


async def test_jobs_name_an_upload_in_each_kind_of_body(gateway: Gateway) -> None:
    upload = await uploaded(gateway)
    name = upload["name"]
    for named in (name, name.removeprefix("uploads/"), f"sha256:{HASH}"):
        spec = {"prompt": "a", "init_image": {"upload": named}}
        form = {"prompt": (None, "a"), "upload": (None, named)}
        answers = [
            await gateway.http.post("/v1/jobs", json={"spec": spec}, headers=KEY),
            await gateway.http.post("/v1/jobs", files=form, headers=KEY),
            await gateway.http.post(
                "/v1/jobs", params={"prompt": "a", "upload": named}, headers=KEY
            ),
        ]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            made = answer.json()["job"]["spec"]
            assert made["width"] > made["height"], "the aspect ratio is that of the upload"


async def test_an_upload_and_an_init_image_are_too_many(gateway: Gateway) -> None:
    files = {"prompt": (None, "a"), "upload": (None, "x"), "init_image": ("cat.jpg", IMAGE)}
    answer = await gateway.http.post("/v1/jobs", files=files, headers=KEY)
    [violation] = answer.json()["violations"]
    assert (violation["field"], violation["reason"]) == ("init_image", "TOO_MANY")


async def test_an_unknown_upload_is_404_with_its_reason(gateway: Gateway) -> None:
    spec = {"prompt": "a", "init_image": {"upload": "nope"}}
    for answer in (
        await gateway.http.post("/v1/jobs", json={"spec": spec}, headers=KEY),
        await gateway.http.get("/v1/uploads/nope", headers=KEY),
        await gateway.http.post("/v1/uploads/nope:complete", headers=KEY),
        await gateway.http.delete("/v1/uploads/nope", headers=KEY),
    ):
        expected = (404, "UPLOAD_NOT_FOUND", str(UploadNotFoundError("nope")))
        body = answer.json()
        assert (answer.status_code, body["reason"], body["message"]) == expected


async def test_a_file_can_be_sent_to_the_bucket(gateway: Gateway) -> None:
    image = photo(96, 64, seed=5)
    announced = {"sha256": hashlib.sha256(image).hexdigest(), "size_bytes": len(image)}
    body = (await gateway.http.post("/v1/uploads", json=announced, headers=KEY)).json()
    name = body["upload"]["name"]
    assert body["put_expire_time"] == body["upload"]["expire_time"]
    early = await gateway.http.post(f"/v1/{name}:complete", headers=KEY)
    assert (early.status_code, early.json()["reason"]) == (409, "UPLOAD_INCOMPLETE")
    blobs, key = gateway.stack.worker.blobs, body["put_url"].removeprefix("memory:///")
    await blobs.put(key, image, "")
    complete = await gateway.http.post(f"/v1/{name}:complete", headers=KEY)
    assert complete.json()["upload"]["complete"] is True
    deleted = await gateway.http.delete(f"/v1/{name}", headers=KEY)
    assert (deleted.status_code, deleted.json()) == (200, {})
    assert (await gateway.http.get(f"/v1/{name}", headers=KEY)).status_code == 404


@pytest.mark.parametrize(
    ("sent", "wrong"),
    [
        ({"json": {}}, {"sha256": "REQUIRED", "size_bytes": "OUT_OF_RANGE"}),
        ({"json": {"image": 5}}, {"image": "INVALID_TYPE"}),
        ({"json": {"image": "https://example.org/a.png"}}, {"image": "INVALID_TYPE"}),
        ({"json": {"image": "GIF89a"}}, {"image": "INVALID_IMAGE"}),
        ({"json": {"file": TEXT}}, {"file": "UNKNOWN_FIELD"}),
        ({"json": {"size_bytes": "x", "sha256": HASH}}, {"size_bytes": "INVALID_TYPE"}),
        ({"json": {"size_bytes": 2**63, "sha256": HASH}}, {"size_bytes": "OUT_OF_RANGE"}),
        ({"files": {"size_bytes": (None, "9" * 30)}}, {"size_bytes": "OUT_OF_RANGE"}),
        ({"files": {"file": ("cat.jpg", IMAGE)}}, {"file": "UNKNOWN_FIELD"}),
        ({"files": {"image": ("cat.jpg", b"")}}, {"image": "REQUIRED"}),
        ({"files": {"image": ("a", IMAGE), "sha256": (None, "0")}}, {"sha256": "INVALID_FORMAT"}),
        (
            {"files": [("image", ("a", IMAGE)), ("image", ("b", IMAGE))]},
            {"image": "TOO_MANY"},
        ),
        ({"content": b"", "headers": {"Content-Type": "image/png"}}, {"image": "REQUIRED"}),
        ({"content": b"x", "headers": {"Content-Type": "image/png"}}, {"image": "INVALID_IMAGE"}),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_wrong_bodies_are_refused_with_reasons(
    sent: dict[str, Any], wrong: dict[str, str], gateway: Gateway
) -> None:
    headers = sent.get("headers", {})
    rest = {name: value for name, value in sent.items() if name != "headers"}
    answer = await gateway.http.post("/v1/uploads", headers=KEY | headers, **rest)
    assert answer.status_code == 400, answer.text
    found = {each["field"]: each["reason"] for each in answer.json()["violations"]}
    assert found == wrong
    answer = await gateway.http.post("/v1/uploads", headers={"key": "wrong"} | headers, **rest)
    assert answer.status_code == 401


async def test_a_full_budget_is_429_with_the_time_to_wait(gateway: Gateway) -> None:
    answer = httpx.Response(200)
    names = []
    for seed in range(30):
        image, headers = photo(512, 512, seed=seed), KEY | {"Content-Type": "image/jpeg"}
        answer = await gateway.http.post("/v1/uploads", content=image, headers=headers)
        if answer.status_code != 200:
            break
        names.append(answer.json()["upload"]["name"])
    assert (answer.status_code, answer.json()["reason"]) == (429, "UPLOADS_FULL")
    assert 0 < int(answer.headers["retry-after"]) <= 24 * 3600
    assert str(MOST_BYTES) in answer.json()["message"]
    for name in names:
        assert (await gateway.http.delete(f"/v1/{name}", headers=KEY)).status_code == 200


async def test_without_the_setting_the_response_names_it() -> None:
    async with running_gateway() as gateway:
        headers = KEY | {"Content-Type": "image/jpeg"}
        answer = await gateway.http.post("/v1/uploads", content=IMAGE, headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (503, "UPLOADS_DISABLED")
    assert "IMG2IMG_UPLOAD_BYTES" in answer.json()["message"]


async def test_the_document_describes_the_bodies_of_uploads(gateway: Gateway) -> None:
    document = (await gateway.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    content = document["paths"]["/v1/uploads"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data", "image/*"}
    request = jsonschema_rs.validator_for(schemas["CreateUploadRequest"])
    assert request.is_valid({"image": TEXT})
    assert request.is_valid({"sha256": HASH, "size_bytes": 7})
    assert not request.is_valid({"sha256": HASH})
    assert not request.is_valid({})
    job = schemas["CreateJobRequest"] | {"components": document["components"]}
    spec = {"prompt": "a", "init_image": {"upload": "x"}}
    assert jsonschema_rs.is_valid(job, {"spec": spec})
    response = {"$ref": "#/components/schemas/CreateUploadResponse"}
    validator = jsonschema_rs.validator_for(response | {"components": document["components"]})
    headers = KEY | {"Content-Type": "image/jpeg"}
    made = (await gateway.http.post("/v1/uploads", content=IMAGE, headers=headers)).json()
    assert validator.is_valid(made)
