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
from img2img_server.gateway.refusals import Case
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
from img2img_server.settings import Settings

_DESCRIPTION = """Pictures out of pictures, compatible with the enterprise realtime image-to-image
API of ModelsLab. The key goes into the body field `key`, or into one of the headers below. The same
service over gRPC streams every denoising step; over HTTP `/v1/jobs/{job_id}/events` does."""
_ANYWHERE = (Case.INVALID_JSON, Case.BAD_KEY, Case.SLOW_BODY, Case.TOO_LARGE, Case.FAULT)
_CREATE = (*_ANYWHERE, Case.FIELDS, Case.FORBIDDEN, Case.RATE_LIMIT, Case.UNAVAILABLE)
_FETCH = (*_ANYWHERE, Case.UNKNOWN_JOB, Case.UNAVAILABLE)
_FETCH_BY_BODY = (*_FETCH, Case.FIELDS)
_MANAGE = (*_ANYWHERE, Case.FORBIDDEN, Case.UNAVAILABLE)
_KEYS: list[Schema] = [{}, {"bearer": []}, {"key": []}, {"x_api_key": []}]
_JOB_ID: Schema = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "description": "The `id` of the answer to img2img.",
    "schema": {"type": "string"},
    "example": "10000041",
}


def document(settings: Settings) -> dict[str, Any]:
    """The document of a gateway with these settings."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "img2img", "version": __version__, "description": _DESCRIPTION},
        "servers": [{"url": settings.public_base_url or "/"}],
        "paths": {
            **_contract(settings.legacy),
            **_management(settings.legacy),
            **_FILES,
            **_EVENTS,
            **_PROBES,
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
        answer = {"summary": "State of a job", "parameters": [_JOB_ID]}
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
        done = _json("Done.", schema, {"success": {"value": example}})
        answer = _operation(_MANAGE, legacy, "KeyRequest", {"key": "my-key"}, done)
        paths[f"/api/v1/enterprise/realtime/{name}"] = {
            "post": {"summary": summary, **answer, "tags": ["management"]}
        }
    for name, (summary, body, sent, told) in STORAGE_EXAMPLES.items():
        done = _json("Done.", STORAGE_DONE, {"success": {"value": told}})
        answer = _operation((*_MANAGE, Case.FIELDS), legacy, body, sent, done)
        paths[f"/api/v1/enterprise/{name}"] = {
            "post": {"summary": summary, **answer, "tags": ["management"]}
        }
    return paths


def _operation(
    cases: tuple[Case, ...],
    legacy: bool,
    body: str = "",
    example: dict[str, Any] | None = None,
    done: Schema | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": ["img2img"],
        "security": _KEYS,
        "responses": _responses(cases, legacy, done),
    }
    if body:
        content = {"schema": {"$ref": f"#/components/schemas/{body}"}, "example": example}
        operation["requestBody"] = {
            "required": "required" in SCHEMAS[body],
            "content": {"application/json": content},
        }
    return operation


def _responses(cases: tuple[Case, ...], legacy: bool, done: Schema | None) -> dict[str, Any]:
    if legacy:
        return {"200": _json("Every answer; `status` says which.", LEGACY)}
    examples = {name: {"value": value} for name, value in JOB_EXAMPLES.items()}
    responses = {"200": done or _json("The job, also when it failed.", JOB, examples)}
    for case in sorted(cases, key=lambda case: case.status):
        shown = {case.name.lower(): {"value": error_example(case)}}
        code = str(case.status)
        if code in responses:
            responses[code]["content"]["application/json"]["examples"] |= shown
            continue
        responses[code] = _json(error_example(case)["message"], ERROR, shown)
        if case in (Case.RATE_LIMIT, Case.UNAVAILABLE):
            retry = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            responses[code]["headers"] = {"Retry-After": retry}
    return responses


def _json(description: str, schema: Schema, examples: dict[str, Any] | None = None) -> Schema:
    content = {"schema": schema} | ({"examples": examples} if examples else {})
    return {"description": description, "content": {"application/json": content}}


def _text(description: str) -> Schema:
    return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}


def _file(method: str) -> Schema:
    picture = {"schema": {"type": "string", "contentMediaType": "image/png"}}
    text = {"schema": {"type": "string", "contentMediaType": "text/plain"}}
    content = {} if method == "head" else {"content": {"image/png": picture, "text/plain": text}}
    return {
        "tags": ["files"],
        "summary": "A result: {file_prefix}-{index}.png, or its base64 text",
        "parameters": [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
        "security": [],
        "responses": {
            "200": {"description": "The file.", **content},
            "404": _text("Not there, or not yet."),
            "503": _text("The store cannot be read."),
        },
    }


_FILES = {
    f"/{folder}/{{name}}": {method: _file(method) for method in ("get", "head")}
    for folder in ("generations", "temp")
}
_EVENT: Schema = {
    "description": "Each event.",
    "type": "object",
    "properties": {
        "event": {"type": "string", "description": "Its kind, a field of JobEvent's oneof."},
        "id": {"type": "string", "pattern": "^[0-9]+$", "description": "Its sequence."},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "id", "data"],
}
_EVENTS = {
    "/v1/jobs/{job_id}/events": {
        "get": {
            "tags": ["events"],
            "summary": "A job's events, live",
            "description": "Server-sent events: `data` is a JobEvent of img2img.v1 as ProtoJSON "
            "with the proto's field names, `event` its kind, `id` its sequence. The key must be in "
            "a header.",
            "security": _KEYS[1:],
            "parameters": [
                _JOB_ID,
                {
                    "name": "after_sequence",
                    "in": "query",
                    "description": "Leave out events up to this number.",
                    "schema": {"type": "integer", "minimum": 0, "default": 0},
                },
                {
                    "name": "Last-Event-ID",
                    "in": "header",
                    "description": "The same, as browsers send it when they reconnect.",
                    "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
                },
            ],
            "responses": {
                "200": {
                    "description": "The events until the job has ended.",
                    "content": {"text/event-stream": {"schema": _EVENT}},
                },
                "204": {"description": "Nothing comes after Last-Event-ID."},
                **{
                    str(case.status): _json(case.message or "Wrong number.", ERROR)
                    for case in (
                        Case.FIELDS,
                        Case.BAD_KEY,
                        Case.UNKNOWN_JOB,
                        Case.FAULT,
                        Case.UNAVAILABLE,
                    )
                },
            },
        }
    }
}
_STATUS: Schema = {
    "type": "object",
    "properties": {"status": {"type": "string"}},
    "required": ["status"],
}
_PROBES = {
    "/healthz": {
        "get": {
            "tags": ["probes"],
            "summary": "The process lives",
            "security": [],
            "responses": {"200": _json("It does.", _STATUS)},
        }
    },
    "/readyz": {
        "get": {
            "tags": ["probes"],
            "summary": "The gateway may serve",
            "security": [],
            "responses": {
                "200": _json("The api serves and the bucket can be read.", _STATUS),
                "503": _json("Why not.", _STATUS),
            },
        }
    },
}
