"""What the OpenAPI document says about the calls of calls.py. Their fields come from the proto."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from img2img.v1 import job_pb2
from img2img_server.domain.params import RANDOM_SEED, SEED_MAX
from img2img_server.domain.urls import URL_MAX_CHARACTERS
from img2img_server.gateway.examples import error_example
from img2img_server.gateway.modelslab.errors import ErrorKind
from img2img_server.gateway.modelslab.fields import FIELDS, LIMITS
from img2img_server.gateway.openapi_parts import JOB_ID, KEYS, RETRY_AFTER, json_body
from img2img_server.gateway.schemas import ERROR, Schema

_ANYWHERE = (ErrorKind.BAD_KEY, ErrorKind.FAULT, ErrorKind.UNAVAILABLE)
_WITH_BODY = (*_ANYWHERE, ErrorKind.INVALID_JSON, ErrorKind.SLOW_BODY, ErrorKind.TOO_LARGE)
_OWN = {"description": "The model's own limits may be narrower, see /v1/capabilities."}
_NARROWED = ("width", "height", "num_inference_steps")
_LIMITS = {
    entry.name: {**entry.schema, **(_OWN if entry.name in _NARROWED else {})} for entry in FIELDS
} | {
    "prompt": {"minLength": 1, "maxLength": LIMITS.max_prompt_characters},
    "seed": {
        "minimum": RANDOM_SEED,
        "maximum": SEED_MAX,
        "description": "-1: drawn at random. Beyond 2^53 as a string: JSON numbers lose digits.",
    },
    "preview_interval_steps": {"minimum": 0, "maximum": LIMITS.max_preview_interval_steps},
    "lora_scale": {"minimum": 0, "maximum": LIMITS.max_lora_scale},
}
_TEXT: Schema = {"type": "string"}
# ProtoJSON takes numbers as strings too; the limits of those no JSON Schema can say.
_TYPES: dict[int, list[Schema]] = {
    FieldDescriptor.CPPTYPE_INT32: [{"type": "integer"}, _TEXT | {"pattern": "^-?[0-9]+$"}],
    FieldDescriptor.CPPTYPE_INT64: [{"type": "integer"}, _TEXT | {"pattern": "^-?[0-9]+$"}],
    FieldDescriptor.CPPTYPE_DOUBLE: [
        {"type": "number"},
        _TEXT | {"pattern": r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"},
    ],
    FieldDescriptor.CPPTYPE_BOOL: [{"type": "boolean"}],
    FieldDescriptor.CPPTYPE_STRING: [_TEXT],
}
_NOTHING: Schema = {"type": "null"}
_INIT_IMAGE: Schema = {
    "description": "One of the two.",
    "oneOf": [
        {
            "type": "object",
            "properties": {name: schema},
            "required": [name],
            "additionalProperties": False,
        }
        for name, schema in {
            "url": {"type": "string", "format": "uri", "maxLength": URL_MAX_CHARACTERS},
            "data": {"type": "string", "contentEncoding": "base64", "minLength": 1},
        }.items()
    ],
}
_ANNOTATIONS: Schema = {
    "type": "object",
    "maxProperties": LIMITS.max_annotations,
    "propertyNames": {"minLength": 1, "maxLength": LIMITS.max_annotation_name_characters},
    "additionalProperties": _TEXT | {"maxLength": LIMITS.max_annotation_characters},
}
_EXAMPLE = {
    "spec": {
        "prompt": "an oil painting of a cat",
        "init_image": {"url": "https://files.example.org/cat.jpg"},
        "strength": 0.7,
        "preview_interval_steps": 1,
    }
}


def calls() -> dict[str, Any]:
    """The paths of these calls."""
    limits = "The models being served, the default one first, and the limits."
    job = {"job": _message("Job")}
    return {
        "/v1/capabilities": {
            "get": _call("GetCapabilities", limits, _message("GetCapabilitiesResponse"), _ANYWHERE)
        },
        "/v1/jobs": {
            "post": {
                **_call(
                    "CreateJob",
                    "Queues a job and answers at once.",
                    {"type": "object", "properties": job, "required": ["job"]},
                    (
                        *_WITH_BODY,
                        ErrorKind.FIELDS,
                        ErrorKind.FORBIDDEN,
                        ErrorKind.REQUEST_ID_REUSED,
                        ErrorKind.RATE_LIMIT,
                    ),
                ),
                "requestBody": _body(_request(), _EXAMPLE),
            }
        },
        "/v1/jobs/{job_id}:cancel": {
            "post": {
                **_call(
                    "CancelJob",
                    "Ends a queued job at once and a running one at its next step.",
                    {"type": "object", "properties": job, "required": ["job"]},
                    (*_WITH_BODY, ErrorKind.UNKNOWN_JOB, ErrorKind.JOB_ENDED),
                ),
                "parameters": [JOB_ID],
            }
        },
    }


def _request() -> Schema:
    """CreateJobRequest."""
    fields = job_pb2.JobSpec.DESCRIPTOR.fields
    spec = {
        "type": "object",
        "properties": {field.name: _field(field) for field in fields},
        "required": ["prompt", "init_image"],
        "additionalProperties": False,
    }
    request_id = {
        "description": "Chosen by the caller: the same one gives the same job again.",
        "anyOf": [{"type": "string", "format": "uuid"}, {"const": ""}, _NOTHING],
    }
    return {
        "type": "object",
        "properties": {"key": _TEXT, "spec": spec, "request_id": request_id},
        "required": ["spec"],
        "additionalProperties": False,
    }


def _field(field: FieldDescriptor) -> Schema:
    """Every spelling that ProtoJSON reads; null is absent."""
    if field.name == "init_image":
        return _INIT_IMAGE
    if field.name == "annotations":
        return {"anyOf": [_ANNOTATIONS, _NOTHING]}
    if field.enum_type is not None:
        known = field.enum_type.values
        return {
            "enum": [*(value.name for value in known), *(value.number for value in known), None]
        }
    first, *others = _TYPES[field.cpp_type]
    first = {**first, **_LIMITS.get(field.name, {})}
    if field.name == "prompt":
        return first
    empty = [{"const": ""}] if "pattern" in first else []
    return {"anyOf": [first, *others, *empty, _NOTHING]}


def _message(name: str) -> Schema:
    description = f"img2img.v1.{name} as JSON with the proto's field names."
    return {"type": "object", "description": description}


def _call(
    method: str, does: str, answer: Schema, refusals: tuple[ErrorKind, ...]
) -> dict[str, Any]:
    responses = {"200": json_body("Done.", answer)}
    for case in sorted(refusals, key=lambda case: case.status):
        told = error_example(case)
        entry = responses.setdefault(str(case.status), json_body(told["message"], ERROR))
        if case in (ErrorKind.RATE_LIMIT, ErrorKind.UNAVAILABLE):
            entry["headers"] = RETRY_AFTER
        content = entry["content"]["application/json"]
        content.setdefault("examples", {})[case.name.lower()] = {"value": told}
    return {
        "tags": ["jobs"],
        "summary": method,
        "description": f"{does} The same as {method} over gRPC.",
        "security": KEYS[1:],
        "responses": responses,
    }


def _body(schema: Schema, example: dict[str, Any]) -> dict[str, Any]:
    content = {"schema": schema, "example": example}
    return {"required": True, "content": {"application/json": content}}
