"""JSON Schemas of the protocol's messages as ProtoJSON, generated from their descriptors."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_server.domain.params import RANDOM_SEED, Limits

Schema = dict[str, Any]

_LIMITS = Limits()
_TEXT: Schema = {"type": "string"}
_DIGITS = _TEXT | {"pattern": "^-?[0-9]+$"}
_DECIMAL = _TEXT | {"pattern": r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"}
_BYTES = _TEXT | {"contentEncoding": "base64"}
_WELL_KNOWN = {
    "google.protobuf.Timestamp": _TEXT | {"format": "date-time"},
    "google.protobuf.Duration": _TEXT | {"pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
}
# By C++ type: every spelling that ProtoJSON reads, the one that it writes first.
_SCALARS: dict[int, list[Schema]] = {
    FieldDescriptor.CPPTYPE_INT32: [{"type": "integer"}, _DIGITS],
    FieldDescriptor.CPPTYPE_INT64: [_DIGITS, {"type": "integer"}],
    FieldDescriptor.CPPTYPE_DOUBLE: [{"type": "number"}, _DECIMAL],
    FieldDescriptor.CPPTYPE_BOOL: [{"type": "boolean"}],
    FieldDescriptor.CPPTYPE_STRING: [_TEXT],
}
_OWN = {"description": "The model's own limits may be narrower, see /v1/capabilities."}
_SIDE = {
    "minimum": _LIMITS.min_side_pixels,
    "maximum": _LIMITS.max_side_pixels,
    "multipleOf": _LIMITS.side_multiple,
    **_OWN,
}
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
            "url": _TEXT | {"format": "uri", "maxLength": _LIMITS.max_url_characters},
            "data": _BYTES | {"minLength": 1},
        }.items()
    ],
}
_ANNOTATIONS: Schema = {
    "type": "object",
    "maxProperties": _LIMITS.max_annotations,
    "propertyNames": {"minLength": 1, "maxLength": _LIMITS.max_annotation_name_characters},
    "additionalProperties": _TEXT | {"maxLength": _LIMITS.max_annotation_characters},
}


def schemas() -> dict[str, Schema]:
    """Returns the schemas of what /v1 takes and returns, by name."""
    found: dict[str, Schema] = {"CreateJobRequest": _create_job_request()}
    for message in ("CreateJobResponse", "CancelJobResponse", "GetCapabilitiesResponse"):
        _add(service_pb2.DESCRIPTOR.message_types_by_name[message], found)
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


def _create_job_request() -> Schema:
    fields = job_pb2.JobSpec.DESCRIPTOR.fields
    spec = {
        "type": "object",
        "properties": {field.name: _read(field) for field in fields},
        "required": ["prompt", "init_image"],
        "additionalProperties": False,
    }
    request_id = {
        "description": "Chosen by the caller: the same one gives the same job again.",
        "anyOf": [_TEXT | {"format": "uuid"}, {"const": ""}, {"type": "null"}],
    }
    return {
        "type": "object",
        "properties": {"key": _TEXT, "spec": spec, "request_id": request_id},
        "required": ["spec"],
        "additionalProperties": False,
    }


def _read(field: FieldDescriptor) -> Schema:
    """Returns every spelling that ProtoJSON reads. Null equals an absent field."""
    if field.name == "init_image":
        return _INIT_IMAGE
    if field.name == "annotations":
        return {"anyOf": [_ANNOTATIONS, {"type": "null"}]}
    if field.enum_type:
        values = field.enum_type.values
        return {"enum": [*(v.name for v in values), *(v.number for v in values), None]}
    spellings = sorted(_SCALARS[field.cpp_type], key=lambda schema: "pattern" in schema)
    first, *others = [spellings[0] | _limits(field.name), *spellings[1:]]
    if field.name == "prompt":
        return first
    empty = [{"const": ""}] if "pattern" in first else []
    return {"anyOf": [first, *others, *empty, {"type": "null"}]}


def _limits(name: str) -> Schema:
    """Returns the limits of a field of JobSpec, from the Limits named like it."""
    if name in ("width", "height"):
        return _SIDE
    if name == "webhook":
        return {"maxLength": _LIMITS.max_url_characters, "pattern": "^https?://"}
    if name == "seed":
        text = "-1: drawn at random. Beyond 2^53 as a string: JSON numbers lose digits."
        return {"minimum": RANDOM_SEED, "maximum": _LIMITS.max_seed, "description": text}
    least = 1 if name in ("samples", "num_inference_steps") else 0
    limits = {
        "minLength": 1 if name == "prompt" else None,
        "maxLength": getattr(_LIMITS, f"max_{name}_characters", None),
        "maximum": getattr(_LIMITS, f"max_{name}", None),
    }
    if limits["maximum"] is not None:
        limits["minimum"] = getattr(_LIMITS, f"min_{name}", least)
    own = _OWN if name == "num_inference_steps" else {}
    return {keyword: limit for keyword, limit in limits.items() if limit is not None} | own
