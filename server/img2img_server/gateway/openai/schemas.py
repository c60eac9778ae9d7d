"""JSON Schemas of OpenAI's requests, responses and events, as this service has them."""

from __future__ import annotations

from typing import Any, Final

from img2img_server.domain.params import MAX_QUALITY, ImageFormat, Limits
from img2img_server.gateway.http.forms import MEDIA_TYPE
from img2img_server.gateway.openai.requests import HIGH_FIDELITY_STRENGTH, MAX_PARTIAL_IMAGES
from img2img_server.gateway.openai.responses import IGNORED_HEADER, JOB_HEADER, WARNING_HEADER

Schema = dict[str, Any]
_TEXT: Final[Schema] = {"type": "string"}
_INTEGER: Final[Schema] = {"type": "integer"}
_FORMATS: Final = [each.value for each in ImageFormat]
EVENTS: Final[Schema] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"event": _TEXT, "data": _TEXT},
            "description": "With `stream`: `image_edit.partial_image`, `image_edit.completed` and "
            "`error`. `data` is an OpenAIImageEvent or an OpenAIError.",
        }
    }
}
HEADERS: Final[Schema] = {
    JOB_HEADER: {"description": "The `id` of the job, for /v1/jobs.", "schema": _TEXT},
    IGNORED_HEADER: {"description": "Fields without effect.", "schema": _TEXT},
    WARNING_HEADER: {"description": "Sentences about the job, see Job.warning.", "schema": _TEXT},
}
EDIT_BODY: Final[Schema] = {
    "requestBody": {
        "required": True,
        "content": {
            MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/OpenAIEditForm"}},
            "application/json": {"schema": {"$ref": "#/components/schemas/OpenAIEdit"}},
        },
    }
}


def schemas(limits: Limits) -> dict[str, Schema]:
    """Returns the schemas by name."""
    fields = _fields(limits)
    file = {"contentMediaType": "application/octet-stream"}
    image = _TEXT | {"minLength": 1, "description": "A URL, a data URI or base64."}
    return {
        "OpenAIEditForm": _object({"prompt": fields["prompt"], "image": file}, fields),
        "OpenAIEdit": _object({"prompt": fields["prompt"], "image": image}, fields),
        "OpenAIImages": _object(
            {
                "created": _INTEGER,
                "data": {"type": "array", "items": _image()},
                "size": _TEXT,
                "output_format": {"enum": _FORMATS},
                "background": {"const": "opaque"},
            }
        ),
        "OpenAIImageEvent": _event(),
        "OpenAIModel": _model(),
        "OpenAIModels": _object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "items": {"$ref": "#/components/schemas/OpenAIModel"}},
            }
        ),
        "OpenAIError": _object({"error": _error()}),
    }


def _fields(limits: Limits) -> dict[str, Schema]:
    size = _TEXT | {
        "pattern": "^(auto|[0-9]+x[0-9]+)$",
        "description": "`auto`, the default: the aspect ratio of the init image at the native area "
        "of the model.",
    }
    fidelity = {
        "enum": ["low", "high"],
        "description": f"`high`: strength {HIGH_FIDELITY_STRENGTH}; `low`: the model's default.",
    }
    strength = {
        "type": "number",
        "minimum": limits.min_strength,
        "maximum": limits.max_strength,
        "description": "How strongly the image is changed. Default: the model's own.",
    }
    scale = {
        "type": "number",
        "minimum": limits.min_lora_scale,
        "maximum": limits.max_lora_scale,
    }
    loras = {
        "description": "LoRAs and their scales, such as `ink:0.8,oil`, or an object, in a form the "
        "fields `loras[ink]` and so on. `/v1/capabilities` has the names.",
        "anyOf": [
            _TEXT,
            {"type": "object", "maxProperties": limits.max_loras, "additionalProperties": scale},
        ],
    }
    return {
        "prompt": _TEXT | {"minLength": 1, "maxLength": limits.max_prompt_characters},
        "model": _TEXT | {"description": "Default: the first model of /v1/models."},
        "n": _INTEGER | {"minimum": 1, "maximum": limits.max_samples},
        "size": size,
        "response_format": {"enum": ["b64_json", "url"], "default": "b64_json"},
        "output_format": {"enum": _FORMATS, "default": ImageFormat.PNG.value},
        "output_compression": _INTEGER | {"minimum": 0, "maximum": MAX_QUALITY},
        "stream": {"type": "boolean", "default": False},
        "partial_images": _INTEGER | {"minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
        "input_fidelity": fidelity,
        "user": _TEXT | {"maxLength": limits.max_track_id_characters},
        "strength": strength,
        "seed": _INTEGER | {"minimum": 0, "maximum": limits.max_seed},
        "negative_prompt": _TEXT | {"maxLength": limits.max_negative_prompt_characters},
        "num_inference_steps": _INTEGER | {"minimum": 1, "maximum": limits.max_num_inference_steps},
        "guidance_scale": {"type": "number", "minimum": 0, "maximum": limits.max_guidance_scale},
        "loras": loras,
    }


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required)}


def _image() -> Schema:
    found = {"seed": _INTEGER, "nsfw": {"type": "boolean"}}
    return _object(found, {"b64_json": _TEXT, "url": _TEXT})


def _event() -> Schema:
    kinds = ["image_edit.partial_image", "image_edit.completed"]
    common = {"type": {"enum": kinds}, "b64_json": _TEXT, "created_at": _INTEGER, "size": _TEXT}
    common |= {"output_format": {"enum": _FORMATS}, "image_index": _INTEGER}
    common |= {"quality": {"const": "auto"}, "background": {"const": "opaque"}}
    completed = {"seed": _INTEGER, "nsfw": {"type": "boolean"}, "url": _TEXT, "warning": _TEXT}
    usage = {"type": "object", "description": "Zeros: no tokens are counted."}
    return _object(common, {"partial_image_index": _INTEGER, "usage": usage} | completed)


def _model() -> Schema:
    created = _INTEGER | {"description": "Always 0."}
    found = {"id": _TEXT, "object": {"const": "model"}, "created": created, "owned_by": _TEXT}
    return _object(found)


def _error() -> Schema:
    param = {"anyOf": [_TEXT, {"type": "null"}], "description": "Name of the field."}
    return _object({"message": _TEXT, "type": _TEXT, "param": param, "code": _TEXT})
