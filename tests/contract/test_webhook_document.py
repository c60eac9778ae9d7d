"""The webhook in the OpenAPI document: real bodies and headers match its schemas."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema_rs
import pytest
import pytest_asyncio

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import responses
from img2img_server.webhooks.signature import Signer
from tests.http_stack import Gateway, running_gateway
from tests.receiver import SECRET

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


async def described(gateway: Gateway) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the operation of the webhook, and the schema of its body with all components."""
    document = (await gateway.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1.")
    operation = document["webhooks"]["jobEnded"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    return operation, schema | {"components": document["components"]}


async def ended(gateway: Gateway, **changes: Any) -> job_pb2.Job:
    job_id = (await gateway.create(**changes)).json()["id"]
    await gateway.http.get(f"/v1/jobs/{job_id}/events", headers=KEY)
    return await gateway.stack.api.get(f"jobs/{job_id}")


async def test_bodies_of_real_jobs_match_the_document(gateway: Gateway) -> None:
    _, schema = await described(gateway)
    validator = jsonschema_rs.validator_for(schema)
    job = await ended(gateway, samples=2, track_id=7)
    failed, cancelled = job_pb2.Job(), job_pb2.Job()
    for other, state in (
        (failed, job_pb2.Job.STATE_FAILED),
        (cancelled, job_pb2.Job.STATE_CANCELLED),
    ):
        other.CopyFrom(job)
        other.state = state
    for each in (job, failed, cancelled):
        body = json.loads(responses.webhook(each, responses.links(each)))
        assert [error.message for error in validator.iter_errors(body)] == []
        for name in body:  # Every key of the body is required.
            less = {key: value for key, value in body.items() if key != name}
            assert not validator.is_valid(less), name
    assert not validator.is_valid({"status": "processing", "id": job.id})


async def test_the_examples_match_the_document_and_cover_both_bodies(gateway: Gateway) -> None:
    operation, schema = await described(gateway)
    validator = jsonschema_rs.validator_for(schema)
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    found = {name: example["value"] for name, example in examples.items()}
    assert {body["status"] for body in found.values()} == {"success", "failed"} == set(found)
    assert all(map(validator.is_valid, found.values()))


async def test_the_headers_of_an_attempt_match_the_document(gateway: Gateway) -> None:
    operation, _ = await described(gateway)
    parameters = {each["name"]: each for each in operation["parameters"]}
    sent = Signer(f"{SECRET} {SECRET}").headers(10_000_042, 1767225600, b"{}")
    assert set(sent) == set(parameters)
    for name, value in sent.items():
        assert jsonschema_rs.is_valid(parameters[name]["schema"], value), name
    unsigned = Signer().headers(10_000_042, 1767225600, b"{}")
    assert set(unsigned) == {name for name, each in parameters.items() if each["required"]}
