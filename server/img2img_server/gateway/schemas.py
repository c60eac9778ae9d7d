"""JSON Schemas of the contract, for the OpenAPI document. The request's comes from FIELDS."""

from __future__ import annotations

from typing import Any

from img2img_server.compat.modelslab.server_types import WITHOUT_EFFECT
from img2img_server.domain.storage import MAX_CHARACTERS, REALTIME
from img2img_server.gateway.modelslab.field_types import BOOLEAN
from img2img_server.gateway.modelslab.fields import FIELDS, Field
from img2img_server.gateway.modelslab.storage import FIELDS as STORAGE_FIELDS

Schema = dict[str, Any]

_YES_NO: Schema = {"type": "string", "enum": ["yes", "no"]}
_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_STRING: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_DEPLOY_TYPE: Schema = {
    "enum": [REALTIME, *sorted(WITHOUT_EFFECT), "", None],
    "default": REALTIME,
    "description": "Only `realtime` has an effect.",
}
_CHECK_CONNECTION: Schema = {
    "description": "Store and read a small file first; what does not work is told.",
    "anyOf": [*BOOLEAN.schemas, {"type": "null"}, {"type": "string", "const": ""}],
    "default": False,
}
_STRINGS: Schema = {"type": "array", "items": _STRING}

META = {
    "base64": _YES_NO,
    "enhance_prompt": _YES_NO,
    "enhance_style": _TEXT_OR_NULL,
    "file_prefix": {"type": "string", "format": "uuid"},
    "guidance_scale": _NUMBER,
    "height": _INTEGER,
    "id": _STRING,
    "init_image": _STRING,
    "instant_response": _YES_NO,
    "n_samples": _INTEGER,
    "negative_prompt": _STRING,
    "opacity": _NUMBER,
    "outdir": _STRING,
    "padding_down": _NUMBER,
    "padding_right": _NUMBER,
    "pag_scale": _NUMBER,
    "prompt": _STRING,
    "rescale": _YES_NO,
    "safety_checker": _YES_NO,
    "safety_checker_type": _STRING,
    "scale_down": _NUMBER,
    "seed": _INTEGER,
    "strength": _NUMBER,
    "temp": _YES_NO,
    "track_id": {"type": ["string", "integer", "null"]},
    "watermark": _YES_NO,
    "webhook": _TEXT_OR_NULL,
    "width": _INTEGER,
}
_ID: Schema = {"type": "integer", "minimum": 10_000_001, "maximum": 2**31 - 1}


def _object(properties: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


def _status(word: str) -> Schema:
    return {"type": "string", "const": word}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def request_schema() -> Schema:
    """The body of img2img. Every spelling that is read is listed, null for what is optional."""
    properties = {
        "key": {"type": "string", "description": "API key; may come in a header instead."}
    }
    return {
        "type": "object",
        "properties": properties | {entry.name: _field(entry) for entry in FIELDS},
        "required": [entry.name for entry in FIELDS if entry.required],
    }


def _field(entry: Field) -> Schema:
    if entry.hint:  # whatever is sent is accepted
        return {"description": entry.docs, "default": entry.default}
    spellings = [
        {**schema, **{k: v for k, v in entry.schema.items() if _applies(k, schema)}}
        for schema in entry.kind.schemas
    ]
    if entry.required:
        return {"description": entry.docs, **spellings[0], "minLength": 1}
    nothing = [{"type": "null"}, {"type": "string", "const": ""}]
    return {"description": entry.docs, "anyOf": spellings + nothing, "default": entry.default}


def _applies(keyword: str, schema: Schema) -> bool:
    of_text = keyword in ("maxLength", "pattern")
    return of_text == (schema["type"] == "string") and "enum" not in schema


def storage_schema() -> Schema:
    """The body of update_s3. Null equals absent."""
    required: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS}
    address = {**required, "pattern": "^https?://"}
    special: dict[str, Schema] = {
        "deploy_type": _DEPLOY_TYPE,
        "bucket": {"type": ["string", "null"], "maxLength": MAX_CHARACTERS},
        "public_url": address,
        "endpoint_url": address,
    }
    return {
        "type": "object",
        "properties": {"key": _STRING}
        | {name: special.get(name, required) for name in STORAGE_FIELDS}
        | {"check_connection": _CHECK_CONNECTION},
        "required": [name for name in STORAGE_FIELDS if name not in ("deploy_type", "bucket")],
    }


KEY = {"type": "object", "properties": {"key": _STRING}}
FETCH_BY_BODY = {
    "type": "object",
    "properties": {
        "key": _STRING,
        "request_id": {"anyOf": [_INTEGER, {"type": "string", "pattern": "^[0-9]+$"}]},
    },
    "required": ["request_id"],
}
SCHEMAS: dict[str, Schema] = {
    "Img2ImgRequest": request_schema(),
    "KeyRequest": KEY,
    "FetchByIdRequest": FETCH_BY_BODY,
    "Meta": _object(META),
    "Success": _object(
        {
            "status": _status("success"),
            "generationTime": {**_NUMBER, "description": "Seconds of computing."},
            "id": _ID,
            "output": {**_STRINGS, "description": "One link a sample, in order."},
            "proxy_links": _STRINGS,
            "nsfw_content_detected": {"type": "boolean"},
            "webhook_status": _STRING,
            "warning": _STRING,
            "meta": _ref("Meta"),
        }
    ),
    "Processing": _object(
        {
            "status": _status("processing"),
            "tip": _STRING,
            "eta": {**_NUMBER, "minimum": 0, "description": "Seconds."},
            "message": _STRING,
            "fetch_result": {"type": "string", "format": "uri"},
            "id": _ID,
            "output": {"type": "array", "maxItems": 0},
            "future_links": _STRINGS,
            "webhook_status": _STRING,
            "meta": _ref("Meta"),
        }
    ),
    "Failed": _object(
        {
            "status": _status("failed"),
            "id": _ID,
            "message": _STRING,
            "output": {"type": "array", "maxItems": 0},
        }
    ),
    "Done": _object({"status": _status("success"), "message": _STRING}),
    "SystemDetails": _object(
        {
            "status": _status("success"),
            "message": _STRING,
            "model_count": {**_INTEGER, "minimum": 0},
            "queue_num": {**_INTEGER, "minimum": 0, "description": "Waiting jobs."},
            "queue_time": {**_NUMBER, "minimum": 0, "description": "Seconds until they end."},
            "data": _object(
                {
                    "server_version": _STRING,
                    "uptime": {"type": "string", "pattern": "^[0-9]+d [0-9]+h [0-9]+m$"},
                    "gpu_usage": {"type": "string", "pattern": "^[0-9]+%$"},
                }
            ),
        }
    ),
    "UpdateS3Request": storage_schema(),
    "ResetS3Request": {
        "type": "object",
        "properties": {"key": _STRING, "deploy_type": _DEPLOY_TYPE},
    },
    "StorageDone": _object(
        {
            "status": _status("success"),
            "message": _STRING,
            "deploy_type": _STRING,
            "public_url": _STRING,
            "image_directory": _STRING,
            "warning": _STRING,
        },
        optional=("public_url", "image_directory", "warning"),
    ),
    "Error": _object(
        {
            "status": _status("error"),
            "message": _STRING,
            "reason": {
                "type": "string",
                "pattern": "^[A-Z][A-Z0-9_]*$",
                "description": "For programs: the same word as in gRPC's ErrorInfo.",
            },
            "errors": {"type": "object", "additionalProperties": _STRINGS},
            "retry_after": {"type": "integer", "minimum": 1},
        },
        optional=("errors", "retry_after"),
    ),
    "Legacy": {
        "type": "object",
        "properties": {
            "status": {"type": "string", "enum": ["success", "processing", "failed", "error"]}
        },
        "required": ["status"],
    },
}
JOB: Schema = {"oneOf": [_ref("Success"), _ref("Processing"), _ref("Failed")]}
DONE, DETAILS, STORAGE_DONE = _ref("Done"), _ref("SystemDetails"), _ref("StorageDone")
ERROR, LEGACY = _ref("Error"), _ref("Legacy")
