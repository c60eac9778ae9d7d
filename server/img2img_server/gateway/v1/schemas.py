"""JSON Schemas of the protocol's messages as ProtoJSON, generated from their descriptors."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_server.domain.params import MAX_QUALITY, RANDOM_SEED, Limits

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_DIGITS = _TEXT | {"pattern": "^-?[0-9]+$"}
_DECIMAL = _TEXT | {"pattern": r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"}
_BYTES = _TEXT | {"contentEncoding": "base64"}
_WELL_KNOWN = {
    "google.protobuf.Timestamp": _TEXT | {"format": "date-time"},
    "google.protobuf.Duration": _TEXT | {"pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
}
# Schemas by C++ type, for every spelling that ProtoJSON reads. ProtoJSON writes the first spelling.
_SCALARS: dict[int, list[Schema]] = {
    FieldDescriptor.CPPTYPE_INT32: [{"type": "integer"}, _DIGITS],
    FieldDescriptor.CPPTYPE_INT64: [_DIGITS, {"type": "integer"}],
    FieldDescriptor.CPPTYPE_DOUBLE: [{"type": "number"}, _DECIMAL],
    FieldDescriptor.CPPTYPE_BOOL: [{"type": "boolean"}],
    FieldDescriptor.CPPTYPE_STRING: [_TEXT],
}
_SOURCES = job_pb2.InitImage.DESCRIPTOR.fields
_REQUEST_ID = {"description": "Chosen by the caller: the same one gives the same job again."}
_CALLS = (
    *("CreateJob", "EstimateJob", "GetJob", "ListJobs", "CancelJob", "CreateStreamToken"),
    *("CreateUpload", "CompleteUpload", "GetUpload", "DeleteUpload", "GetCapabilities"),
)
JOB_BODY: Schema = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/CreateJobRequest"}},
            "multipart/form-data": {"schema": {"$ref": "#/components/schemas/CreateJobForm"}},
            "image/*": {"schema": {"contentMediaType": "application/octet-stream"}},
        },
    }
}
ESTIMATE_BODY: Schema = {
    "requestBody": {
        "required": True,
        "content": {
            **JOB_BODY["requestBody"]["content"],
            "application/json": {"schema": {"$ref": "#/components/schemas/EstimateJobRequest"}},
        },
    }
}
JOB_QUERY: Schema = {
    "name": "fields",
    "in": "query",
    "description": "Fields of the spec that the body does not have, each as a parameter. If "
    "the body is an image, all others are here.",
    "style": "form",
    "explode": True,
    "schema": {"$ref": "#/components/schemas/JobFields"},
}


def schemas(limits: Limits) -> dict[str, Schema]:
    """Returns the schemas of the requests and responses of /v1, by name."""
    found: dict[str, Schema] = {"CreateJobRequest": _create_job_request(limits)}
    found["CreateJobForm"] = _create_job_form(limits)
    found["JobFields"] = _object({}, _texts(limits))
    found["EstimateJobRequest"] = _estimate_job_request(limits)
    found["CreateUploadRequest"] = _create_upload_request(limits)
    found["CreateUploadForm"] = _create_upload_form()
    for call in _CALLS:
        _add(service_pb2.DESCRIPTOR.message_types_by_name[f"{call}Response"], found)
    _add(event_pb2.JobEvent.DESCRIPTOR, found)
    return found


def _add(message: Descriptor, found: dict[str, Schema]) -> None:
    if message.name in found:
        return
    found[message.name] = {
        "type": "object",
        "properties": {},
        "required": [field.name for field in message.fields if not field.has_presence],
    }
    for field in message.fields:
        found[message.name]["properties"][field.name] = _written(field, found)


def _written(field: FieldDescriptor, found: dict[str, Schema]) -> Schema:
    kind = field.message_type
    if kind and kind.GetOptions().map_entry:
        return {
            "type": "object",
            "additionalProperties": _written(kind.fields_by_name["value"], found),
        }
    if kind and kind.full_name in _WELL_KNOWN:
        schema = _WELL_KNOWN[kind.full_name]
    elif kind:
        _add(kind, found)
        schema = {"$ref": f"#/components/schemas/{kind.name}"}
    elif field.enum_type:
        schema = {"enum": [value.name for value in field.enum_type.values]}
    else:
        schema = _BYTES if field.type == field.TYPE_BYTES else _SCALARS[field.cpp_type][0]
    return {"type": "array", "items": schema} if field.is_repeated else schema


def _create_job_request(limits: Limits) -> Schema:
    fields = {field.name: _read(field, limits) for field in job_pb2.JobSpec.DESCRIPTOR.fields}
    required = {name: fields.pop(name) for name in ("prompt", "init_image")}
    spec = _object(required, fields)
    spec["description"] = "The model's own limits may be narrower, see /v1/capabilities."
    request_id = {"anyOf": [_TEXT | {"format": "uuid"}, {"const": ""}, {"type": "null"}]}
    return _object({"spec": spec}, {"key": _TEXT, "request_id": request_id | _REQUEST_ID})


def _create_job_form(limits: Limits) -> Schema:
    fields = _texts(limits)
    text = "A file; or a text: a URL, a data URI or base64."
    fields["init_image"] = {"contentMediaType": "application/octet-stream", "description": text}
    return _object({"prompt": fields.pop("prompt")}, fields | {"key": _TEXT})


def _texts(limits: Limits) -> dict[str, Schema]:
    """Returns the schemas of the fields that a form or a query has as texts."""
    fields = {field.name: _text(field, limits) for field in job_pb2.JobSpec.DESCRIPTOR.fields}
    upload = _TEXT | {"description": "An upload, in place of init_image: its name, id or hash."}
    return fields | {"request_id": _TEXT | {"format": "uuid"} | _REQUEST_ID, "upload": upload}


def _text(field: FieldDescriptor, limits: Limits) -> Schema:
    if field.name == "init_image":
        return _TEXT | {"minLength": 1, "description": "A URL, a data URI or base64."}
    if field.message_type:
        description = "A JSON object with texts."
        return _TEXT | {"contentMediaType": "application/json", "description": description}
    if field.enum_type:
        return {"enum": [value.name for value in field.enum_type.values]}
    return _SCALARS[field.cpp_type][0] | _keywords(field.name, limits)


def _create_upload_request(limits: Limits) -> Schema:
    text = "In base64, or as a data URI. Without it, the file is sent to `put_url`."
    size = {"minimum": 1, "maximum": limits.max_image_bytes}
    announced = {"sha256": _TEXT | {"pattern": "^[0-9a-fA-F]{64}$"}}
    announced["size_bytes"] = {"type": "integer", **size}
    image = _object({"image": _BYTES | {"minLength": 1, "description": text}}, {"key": _TEXT})
    return {"anyOf": [image, _object(announced, {"key": _TEXT})]}


def _create_upload_form() -> Schema:
    image = {"contentMediaType": "application/octet-stream", "description": "The file."}
    return _object({"image": image}, {"key": _TEXT})


def _estimate_job_request(limits: Limits) -> Schema:
    fields = {field.name: _read(field, limits) for field in job_pb2.JobSpec.DESCRIPTOR.fields}
    return _object({"spec": _object({"prompt": fields.pop("prompt")}, fields)}, {"key": _TEXT})


def _read(field: FieldDescriptor, limits: Limits) -> Schema:
    """Returns a schema for every spelling that ProtoJSON reads. Null equals an absent field."""
    if field.name == "init_image":
        return {"oneOf": [_object({each.name: _source(each, limits)}) for each in _SOURCES]}
    if field.name == "annotations":
        longest = {"maxLength": limits.max_annotation_name_characters}
        notes = {
            "type": "object",
            "maxProperties": limits.max_annotations,
            "propertyNames": {"minLength": 1, **longest},
            "additionalProperties": _TEXT | {"maxLength": limits.max_annotation_characters},
        }
        return {"anyOf": [notes, {"type": "null"}]}
    if field.name == "loras":
        kind = job_pb2.Lora.DESCRIPTOR.fields_by_name
        name, scale = _TEXT | {"minLength": 1}, _read(kind["scale"], limits)
        items = _object({"name": name}, {"scale": scale})
        loras = {"type": "array", "maxItems": limits.max_loras, "items": items}
        return {"anyOf": [loras, {"type": "null"}]}
    if field.enum_type:
        values = field.enum_type.values
        return {"enum": [*(v.name for v in values), *(v.number for v in values), None]}
    spellings = sorted(_SCALARS[field.cpp_type], key=lambda schema: "pattern" in schema)
    first = spellings[0] | _keywords(field.name, limits)
    if field.name == "prompt":
        return first
    empty = [{"const": ""}] if "pattern" in first else []
    return {"anyOf": [first, *spellings[1:], *empty, {"type": "null"}]}


def _source(field: FieldDescriptor, limits: Limits) -> Schema:
    if field.name == "upload":
        return _TEXT | {"minLength": 1, "description": "Name, id or sha256: of an upload."}
    schema = _BYTES if field.type == field.TYPE_BYTES else _TEXT | {"format": "uri"}
    return schema | {"minLength": 1} | _keywords(field.name, limits)


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _keywords(name: str, limits: Limits) -> Schema:
    """Returns the limits of a field of JobSpec, which Limits has under the field's name."""
    if name in ("width", "height"):
        low, high = limits.min_side_pixels, limits.max_side_pixels
        return {"minimum": low, "maximum": high, "multipleOf": limits.side_multiple}
    if name == "webhook":
        return {"maxLength": limits.max_url_characters, "pattern": "^https?://"}
    if name == "output_quality":
        return {"minimum": 0, "maximum": MAX_QUALITY}
    if name == "seed":
        text = "-1: drawn at random. Beyond 2^53 as a string: JSON numbers lose digits."
        return {"minimum": RANDOM_SEED, "maximum": limits.max_seed, "description": text}
    if name == "scale":
        return {"minimum": limits.min_lora_scale, "maximum": limits.max_lora_scale}
    if name == "true_cfg_scale":
        return {"minimum": 0, "maximum": limits.max_guidance_scale}
    if longest := getattr(limits, f"max_{name}_characters", None):
        return {"maxLength": longest} | ({"minLength": 1} if name == "prompt" else {})
    if (most := getattr(limits, f"max_{name}", None)) is None:
        return {}
    least = 1 if name in ("samples", "num_inference_steps") else 0
    return {"minimum": getattr(limits, f"min_{name}", least), "maximum": most}
