"""The OpenAPI document at /openapi.json, shown at /docs."""

from __future__ import annotations

from typing import Any

from img2img_server import __version__
from img2img_server.gateway.examples import (
    JOB_EXAMPLES,
    MANAGEMENT_EXAMPLES,
    REQUEST_EXAMPLE,
    STORAGE_EXAMPLES,
    error_example,
)
from img2img_server.gateway.modelslab.errors import ErrorKind
from img2img_server.gateway.openapi_calls import calls
from img2img_server.gateway.openapi_parts import (
    EVENTS,
    FILES,
    JOB_ID,
    KEYS,
    PROBES,
    RETRY_AFTER,
    json_body,
)
from img2img_server.gateway.schemas import (
    DETAILS,
    DONE,
    ERROR,
    JOB,
    LEGACY,
    SCHEMAS,
    STORAGE_DONE,
    Schema,
)
from img2img_server.ports import host_port, reachable
from img2img_server.settings import DEV_KEY, Settings

_DESCRIPTION = """Pictures out of pictures, compatible with the enterprise realtime image-to-image
API of ModelsLab. The key goes into the body field `key`, or into one of the headers below. The same
service over gRPC streams every denoising step; over HTTP `/v1/jobs/{job_id}/events` does."""
_ANYWHERE = (
    ErrorKind.INVALID_JSON,
    ErrorKind.BAD_KEY,
    ErrorKind.SLOW_BODY,
    ErrorKind.TOO_LARGE,
    ErrorKind.FAULT,
    ErrorKind.UNAVAILABLE,
)
_CREATE = (*_ANYWHERE, ErrorKind.FIELDS, ErrorKind.FORBIDDEN, ErrorKind.RATE_LIMIT)
_FETCH = (*_ANYWHERE, ErrorKind.UNKNOWN_JOB)
_FETCH_BY_BODY = (*_FETCH, ErrorKind.FIELDS)
_MANAGE = (*_ANYWHERE, ErrorKind.FORBIDDEN)


def document(settings: Settings) -> dict[str, Any]:
    """The document of a gateway with these settings."""
    told = _document(settings)
    if settings.has_open_dev_key:
        _make_examples_work(told["paths"], settings)
    return told


def _make_examples_work(paths: dict[str, Any], settings: Settings) -> None:
    """Puts the development key into the examples of request bodies and, where the api may fetch it,
    the playground's example image, so that "Try it out" works as it stands."""
    address = host_port(reachable(settings.http_host), settings.http_port)
    base = settings.public_base_url or f"http://{address}"
    can_fetch = settings.playground and settings.http_port and settings.outbound_allow
    init_image = f"{base.rstrip('/')}/playground/cat.jpg" if can_fetch else ""
    for operations in paths.values():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {})
            for body in content.values():
                body["example"] = _working(body.get("example"), init_image)


def _working(example: Any, init_image: str) -> Any:
    """The example with a key and an init image that work on this machine; a copy."""
    if not isinstance(example, dict) or "aws_secret_access_key" in example:
        return example  # invented storage must not be set by one click
    changed = {name: _working(value, init_image) for name, value in example.items()}
    if "key" in changed:
        changed["key"] = DEV_KEY
    if init_image and "init_image" in changed:
        in_proto = isinstance(changed["init_image"], dict)
        changed["init_image"] = {"url": init_image} if in_proto else init_image
        changed["prompt"] = "an oil painting of a cat"
    return changed


def _document(settings: Settings) -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {"title": "img2img", "version": __version__, "description": _DESCRIPTION},
        "servers": [{"url": settings.public_base_url or "/"}],
        "paths": {
            **_contract(settings.legacy),
            **_management(settings.legacy),
            **FILES,
            **calls(),
            **EVENTS,
            **PROBES,
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "key"},
                "x_api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _contract(legacy: bool) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for family in ("/api/v1/enterprise/realtime", "/api/v6/realtime"):
        paths[f"{family}/img2img"] = {
            "post": {
                "summary": "Make pictures out of a picture",
                "description": "Answers when the job has ended, or after a while, or at once with "
                "`instant_response` or `webhook`, with where to fetch it.",
                **_operation(_CREATE, legacy, "Img2ImgRequest", REQUEST_EXAMPLE),
            }
        }
    for family in ("/api/v1/enterprise/realtime", "/api/v6/realtime", "/api/v6/images"):
        answer = {"summary": "State of a job", "parameters": [JOB_ID]}
        paths[f"{family}/fetch/{{job_id}}"] = {
            "get": {**answer, **_operation(_FETCH, legacy)},
            "post": {**answer, **_operation(_FETCH, legacy, "KeyRequest", {"key": "my-key"})},
        }
    for family in ("/api/v1/enterprise", "/api/v6/images"):
        example = {"key": "my-key", "request_id": 10000041}
        paths[f"{family}/fetch"] = {
            "post": {
                "summary": "State of a job, its id in the body",
                **_operation(_FETCH_BY_BODY, legacy, "FetchByIdRequest", example),
            }
        }
    return paths


def _management(legacy: bool) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for name, (summary, example) in MANAGEMENT_EXAMPLES.items():
        schema = DETAILS if name == "system_details" else DONE
        done = json_body("Done.", schema, {"success": {"value": example}})
        answer = _operation(_MANAGE, legacy, "KeyRequest", {"key": "my-key"}, done)
        paths[f"/api/v1/enterprise/realtime/{name}"] = {
            "post": {"summary": summary, **answer, "tags": ["management"]}
        }
    for name, (summary, body, sent, told) in STORAGE_EXAMPLES.items():
        done = json_body("Done.", STORAGE_DONE, {"success": {"value": told}})
        answer = _operation((*_MANAGE, ErrorKind.FIELDS), legacy, body, sent, done)
        paths[f"/api/v1/enterprise/{name}"] = {
            "post": {"summary": summary, **answer, "tags": ["management"]}
        }
    return paths


def _operation(
    cases: tuple[ErrorKind, ...],
    legacy: bool,
    body: str = "",
    example: dict[str, Any] | None = None,
    done: Schema | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": ["img2img"],
        "security": KEYS,
        "responses": _responses(cases, legacy, done),
    }
    if body:
        content = {"schema": {"$ref": f"#/components/schemas/{body}"}, "example": example}
        operation["requestBody"] = {
            "required": "required" in SCHEMAS[body],
            "content": {"application/json": content},
        }
    return operation


def _responses(cases: tuple[ErrorKind, ...], legacy: bool, done: Schema | None) -> dict[str, Any]:
    if legacy:
        return {"200": json_body("Every answer; `status` says which.", LEGACY)}
    examples = {name: {"value": value} for name, value in JOB_EXAMPLES.items()}
    responses = {"200": done or json_body("The job, also when it failed.", JOB, examples)}
    for case in sorted(cases, key=lambda case: case.status):
        shown = {case.name.lower(): {"value": error_example(case)}}
        code = str(case.status)
        if code in responses:
            responses[code]["content"]["application/json"]["examples"] |= shown
            continue
        responses[code] = json_body(error_example(case)["message"], ERROR, shown)
        if case in (ErrorKind.RATE_LIMIT, ErrorKind.UNAVAILABLE):
            responses[code]["headers"] = RETRY_AFTER
    return responses
