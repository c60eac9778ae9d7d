"""What the OpenAPI document says about files, events and probes, and what all of it shares."""

from __future__ import annotations

from typing import Any

from img2img_server.gateway.modelslab.errors import ErrorKind
from img2img_server.gateway.schemas import ERROR, Schema

KEYS: list[Schema] = [{}, {"bearer": []}, {"key": []}, {"x_api_key": []}]
JOB_ID: Schema = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "description": "The `id` of the answer to img2img.",
    "schema": {"type": "string"},
    "example": "10000041",
}
RETRY_AFTER: Schema = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
}


def json_body(description: str, schema: Schema, examples: dict[str, Any] | None = None) -> Schema:
    """A response, or a request, of JSON."""
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


FILES = {
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
EVENTS = {
    "/v1/jobs/{job_id}/events": {
        "get": {
            "tags": ["events"],
            "summary": "A job's events, live",
            "description": "Server-sent events: `data` is a JobEvent of img2img.v1 as ProtoJSON "
            "with the proto's field names, `event` its kind, `id` its sequence. The key must be in "
            "a header.",
            "security": KEYS[1:],
            "parameters": [
                JOB_ID,
                {
                    "name": "after_sequence",
                    "in": "query",
                    "description": "Leave out events up to this number.",
                    "schema": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0},
                },
                {
                    "name": "Last-Event-ID",
                    "in": "header",
                    "description": "The same, as browsers send it when they reconnect.",
                    "schema": {"type": "string", "pattern": "^[0-9]{0,18}$"},
                },
            ],
            "responses": {
                "200": {
                    "description": "The events until the job has ended.",
                    "content": {"text/event-stream": {"schema": _EVENT}},
                },
                "204": {"description": "Nothing comes after Last-Event-ID."},
                **{
                    str(case.status): json_body(case.message or "Wrong number.", ERROR)
                    for case in (
                        ErrorKind.FIELDS,
                        ErrorKind.BAD_KEY,
                        ErrorKind.UNKNOWN_JOB,
                        ErrorKind.RATE_LIMIT,
                        ErrorKind.FAULT,
                        ErrorKind.UNAVAILABLE,
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
PROBES = {
    "/healthz": {
        "get": {
            "tags": ["probes"],
            "summary": "The process lives",
            "security": [],
            "responses": {"200": json_body("It does.", _STATUS)},
        }
    },
    "/readyz": {
        "get": {
            "tags": ["probes"],
            "summary": "The gateway may serve",
            "security": [],
            "responses": {
                "200": json_body(
                    "The api serves, the bucket can be read and a model was announced.", _STATUS
                ),
                "503": json_body("Why not.", _STATUS),
            },
        }
    },
}
