"""What schemathesis is told about this API: keys that work, a picture that is one, jobs that exist.

Schemathesis loads this file itself; see tests/contract/test_http_contract_openapi.py.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis
from schemathesis import GenerationMode

KNOWN = json.loads(os.environ["KNOWN"])  # maker, manager (keys), picture, job, names (of files)
# What is read from a string as well as from a number: no JSON Schema knows limits of the former.
NUMBERS = ("width", "height", "samples", "seed", "strength")
ADDRESSES = ("webhook", "public_url", "endpoint_url")
# Printable text without folders named "..": no pattern says that either.
TEXTS = (
    "region_name",
    "aws_access_key_id",
    "aws_secret_access_key",
    "image_directory",
    "bucket",
)


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Lets requests through to what they are about. Those that are meant to be wrong stay so."""
    meant_to_be_right = case.meta.generation.mode == GenerationMode.POSITIVE
    managing = "management" in (case.operation.tags or [])
    key = KNOWN["manager" if managing else "maker"]
    if isinstance(case.body, dict):
        if "key" not in case.body or isinstance(case.body["key"], str):
            case.body["key"] = key
        if meant_to_be_right:
            _correct(case.body)
    elif case.method == "GET" and case.headers is not None:
        case.headers["X-API-Key"] = key
    if meant_to_be_right and case.path_parameters:
        known = {"job_id": KNOWN["job"], "name": KNOWN["names"].get(case.path.split("/")[1])}
        for name in case.path_parameters:
            case.path_parameters[name] = known[name]


def _correct(body: dict[str, Any]) -> None:
    if "init_image" in body:
        body["init_image"] = KNOWN["picture"]
    if "request_id" in body:
        body["request_id"] = KNOWN["job"]
    for name in NUMBERS:
        if isinstance(body.get(name), str) and body[name]:
            body[name] = {"samples": " 2 ", "strength": "0.5", "seed": "7"}.get(name, "512")
    if body.get("check_connection"):  # there is no storage at that address
        body["check_connection"] = "no"
    for name in ADDRESSES + TEXTS:
        if body.get(name):
            body[name] = "https://files.example.org/a" if name in ADDRESSES else "some text"
