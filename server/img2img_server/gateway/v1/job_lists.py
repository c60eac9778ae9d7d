"""Reads the query of GET /v1/jobs."""

from __future__ import annotations

import re
from typing import Any, Final

from starlette.requests import Request

from img2img.v1 import job_pb2, service_pb2
from img2img_server.domain.violations import (
    Reason,
    Violation,
    invalid_type,
    not_supported,
    out_of_range,
)
from img2img_server.gateway.http import request_ids
from img2img_server.gateway.v1 import protojson
from img2img_server.idempotency import request_id_of

MAX_PAGE_SIZE: Final = 100
_INTEGER: Final = re.compile(r"-?[0-9]{1,9}", re.ASCII)
_STATES: Final = {name: number for name, number in job_pb2.Job.State.items() if number}
_TEXT: Final = {"type": "string"}


def _parameter(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


# A part of the OpenAPI operation.
PARAMETERS: Final[dict[str, Any]] = {
    "parameters": [
        _parameter(
            "page_size",
            "Largest number of jobs in the response. Default: 20.",
            {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE},
        ),
        _parameter("page_token", "`next_page_token` of the previous page.", _TEXT),
        _parameter(
            "states",
            "Only jobs in this state are returned. May be repeated. Default: jobs in any state.",
            {"type": "array", "items": {"enum": list(_STATES)}},
        ),
        _parameter(
            "request_id",
            "Only the job of this request is returned: an Idempotency-Key, X-Request-Id or "
            "request_id.",
            request_ids.SCHEMA | {"pattern": "^([!-~]([ -~]*[!-~])?)?$"},
        ),
    ]
}
_NAMES: Final = [parameter["name"] for parameter in PARAMETERS["parameters"]]


def read(request: Request) -> tuple[service_pb2.ListJobsRequest, list[Violation]]:
    """Returns the request of the api, and a violation for each parameter that cannot be read."""
    wanted, violations = service_pb2.ListJobsRequest(), []
    given: set[str] = set()
    for name, text in request.query_params.multi_items():
        if name not in _NAMES:
            violations.append(protojson.unknown_parameter(name))
            continue
        if name in given and name != "states":
            violations.append(protojson.sent_twice(name))
            continue
        given.add(name)
        if wrong := _take(wanted, name, text):
            violations.append(wrong)
    return wanted, violations


def _take(wanted: service_pb2.ListJobsRequest, name: str, text: str) -> Violation | None:
    if name == "page_size":
        if not _INTEGER.fullmatch(text):
            return invalid_type(name, "an integer")
        wanted.page_size = int(text)
        # In the protocol 0 is the default, here it was sent.
        return None if wanted.page_size else out_of_range(name, 1, MAX_PAGE_SIZE)
    if name == "page_token":
        wanted.page_token = text
    elif name == "states":
        if text not in _STATES:
            return not_supported(name, _STATES)
        wanted.states.append(_STATES[text])
    elif text:
        try:
            wanted.request_id = request_id_of(text)
        except ValueError:
            return Violation(name, Reason.INVALID_FORMAT, request_ids.INVALID)
    return None
