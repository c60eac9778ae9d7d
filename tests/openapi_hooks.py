"""Values of this API for schemathesis: valid keys, a valid image and existing jobs.

Schemathesis loads this file itself; see tests/contract/test_http_contract_openapi.py.
"""

from __future__ import annotations

import base64
import json
import os
import uuid
from typing import Any

import httpx
import schemathesis
from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation

from img2img_server.domain.params import is_blank

KNOWN = json.loads(os.environ["KNOWN"])  # keys, models, image, job, names of files, url
# Fields that are read from a string as well as from a number: JSON Schema cannot express limits of
# such strings.
NUMBERS = {
    "width": "512",
    "height": "512",
    "samples": "2",
    "seed": "7",
    "strength": "0.5",
    "num_inference_steps": "4",
    "guidance_scale": "1.5",
    "preview_interval_steps": "1",
    "true_cfg_scale": "2",
    "output_quality": "80",
    "clip_skip": "1",
}
ADDRESSES = ("webhook", "public_url", "endpoint_url")
# Printable text without folders named "..", which a pattern cannot express.
TEXTS = (
    "region_name",
    "aws_access_key_id",
    "aws_secret_access_key",
    "image_directory",
    "bucket",
)


@schemathesis.hook
def before_load_schema(_context: Any, raw_schema: dict[str, Any]) -> None:
    """Leaves JSON as the only body of POST /v1/jobs, /v1/jobs:estimate and /v1/uploads: the
    coverage of forms, images and the query would take as long as that of all other paths.
    tests/contract/test_v1_jobs.py, test_v1_messages.py and test_v1_uploads.py have their cases.
    """
    for path in ("/v1/jobs", "/v1/jobs:estimate", "/v1/uploads"):
        operation = raw_schema["paths"][path]["post"]
        parameters = operation.get("parameters", [])
        operation["parameters"] = [each for each in parameters if each["in"] != "query"]
        content = operation["requestBody"]["content"]
        operation["requestBody"]["content"] = {"application/json": content["application/json"]}


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Makes valid requests pass the checks that are not their subject. Invalid requests remain
    unchanged.
    """
    meant_to_be_right = case.meta.generation.mode == GenerationMode.POSITIVE
    managing = "management" in (case.operation.tags or [])
    key = KNOWN["manager" if managing else "maker"]
    if "openai" in (case.operation.tags or []):
        headers = case.meta.components.get(ParameterLocation.HEADER)
        if not headers or headers.mode == GenerationMode.POSITIVE:
            case.headers = {**(case.headers or {}), "X-API-Key": key}
        is_form = case.media_type == "multipart/form-data"
        if is_form and isinstance(case.body, dict) and not meant_to_be_right:
            # All values of a form are texts, so a wrong type cannot be sent.
            case.body.pop("prompt", None)
        if isinstance(case.body, dict) and meant_to_be_right:
            _correct_edit(case.body, base64.b64decode(KNOWN["image"]) if is_form else None)
    elif isinstance(case.body, dict):
        if "key" not in case.body or isinstance(case.body["key"], str):
            case.body["key"] = key
        if meant_to_be_right:
            _correct(case.body.get("spec", case.body))
            if "spec" in case.body and case.body.get("request_id"):
                # A used request_id would return the job of another request.
                case.body["request_id"] = str(uuid.uuid4())
    elif case.headers is not None:
        case.headers["X-API-Key"] = key
    if case.query and "page_token" in case.query:  # Only a response has a valid one.
        case.query["page_token"] = ""
    if meant_to_be_right and case.headers and "Idempotency-Key" in case.headers:
        # A used key would return the job of another request.
        case.headers["Idempotency-Key"] = str(uuid.uuid4())
    if meant_to_be_right and case.path_parameters:
        name = KNOWN["names"].get(case.path.split("/")[1], KNOWN["model"])
        known = {"job_id": KNOWN["job"], "upload_id": KNOWN["upload"], "name": name}
        for name in case.path_parameters:
            case.path_parameters[name] = known[name]
    # This also replaces an id from a response, whose job has ended.
    if case.path.endswith(":cancel") and str(case.path_parameters["job_id"]).isdecimal():
        case.path_parameters["job_id"] = _waiting_job()


def _waiting_job() -> str:
    """Returns a new job that no worker takes."""
    spec = {"prompt": "a", "init_image": {"data": KNOWN["image"]}, "model": KNOWN["idle"]}
    answer = httpx.post(f"{KNOWN['url']}/v1/jobs", json={"key": KNOWN["maker"], "spec": spec})
    return str(answer.raise_for_status().json()["job"]["id"])


def _correct_prompt(body: dict[str, Any]) -> None:
    """Replaces a prompt without a visible character, which no pattern can describe."""
    if isinstance(body.get("prompt"), str) and is_blank(body["prompt"]):
        body["prompt"] = "a"


def _correct_edit(body: dict[str, Any], file: bytes | None) -> None:
    """Replaces values whose validity no schema can express."""
    _correct_prompt(body)
    body["image"] = file or KNOWN["image"]
    for name, known in (
        ("model", KNOWN["model"]),
        ("size", "256x264"),
        ("image[]", ""),
        ("loras", ""),
    ):
        if name in body:
            body[name] = known


def _correct(body: dict[str, Any]) -> None:
    _correct_prompt(body)
    if "image" in body:  # of an upload
        body["image"] = KNOWN["image"]
    if "init_image" in body:
        inline = KNOWN["image"]
        body["init_image"] = inline if isinstance(body["init_image"], str) else {"data": inline}
    for name, known in (("model", KNOWN["model"]), ("scheduler", ""), ("loras", [])):
        if name in body:
            body[name] = known
    if "request_id" in body:
        body["request_id"] = KNOWN["job"]
    for name, number in NUMBERS.items():
        if isinstance(body.get(name), str) and body[name]:
            body[name] = number
    if body.get("check_connection"):  # No storage exists at that address.
        body["check_connection"] = "no"
    for name in ADDRESSES + TEXTS:
        if body.get(name):
            body[name] = "https://files.example.org/a" if name in ADDRESSES else "some text"
