"""Messages of img2img.v1 as JSON: the proto's own field names, 64-bit integers as strings, bytes as
base64, every field present."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from img2img.v1 import job_pb2
from img2img_server.domain.params import JobParams, ValidationContext, validate
from img2img_server.domain.violations import Reason, Violation, invalid_type
from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.modelslab.fields import FIELDS

_ENUMS = {
    field.name: [value.name for value in field.enum_type.values if value.number]
    for field in job_pb2.JobSpec.DESCRIPTOR.fields
    if field.enum_type
}
_EXPECTED = {
    **{entry.name: entry.kind.expected for entry in FIELDS},
    **{name: f"one of {', '.join(values)}" for name, values in _ENUMS.items()},
    "spec": "an object",
    "init_image": 'an object with either "url" or "data" (base64)',
}
_NUMBERS = (
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
    FieldDescriptor.CPPTYPE_ENUM,
)
_BEYOND = 2**64  # larger than any limit
# Where it is said: "Failed to parse spec field: Failed to parse width field: …" or
# "… at CreateJobRequest.spec.width".
_STEPS = re.compile(r"Failed to parse (\w+) field")
_PLACE = re.compile(r" at \w+\.([\w.]+)")
_UNKNOWN = re.compile(r'has no field named "(\w{1,64})"')


def dump(message: Message) -> str:
    """The message on one line."""
    return json_format.MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=None,
    )


def fill(message: Message, body: dict[str, Any]) -> None:
    """Sets what the body has.

    Raises:
        RequestError: FIELDS, with the one field that cannot be read or is not known.
    """
    if name := _no_object(body) or _misread(message.DESCRIPTOR, body):
        del body
        raise RequestError(ErrorKind.FIELDS, violations=[_unreadable(name)])
    try:
        json_format.ParseDict(body, message)
        return
    # The last two: an infinite enum, a name that is no Unicode text.
    except (json_format.ParseError, OverflowError, SystemError) as error:
        wrong = _violation(str(error))
    # Raised here and without the body, which the errors' frames would keep while they are held.
    del body
    raise RequestError(ErrorKind.FIELDS, violations=[wrong])


def _no_object(body: dict[str, Any]) -> str:
    """Returns the name of the message that is something else; the library takes texts for names."""
    spec = body.get("spec")
    init_image = spec.get("init_image") if isinstance(spec, dict) else None
    values = {"spec": spec, "init_image": init_image}
    return next((name for name, value in values.items() if not isinstance(value, dict | None)), "")


def _misread(kind: Any, body: dict[str, Any]) -> str:
    """Returns the name of a field that the library would read as something else: true as 1, digits
    of other scripts as numbers, an enum's number beyond 32 bits as the default.

    Args:
        kind: the message's Descriptor.
    """
    for field in kind.fields:
        value = body.get(field.name)
        if isinstance(value, dict):
            if inner := _misread(field.message_type, value) if field.message_type else "":
                return inner
        elif field.cpp_type in _NUMBERS and (
            isinstance(value, bool)
            or (isinstance(value, str) and not value.isascii())
            or (field.enum_type and isinstance(value, int) and not -(2**31) <= value < 2**31)
        ):
            return str(field.name)
    return ""


def _violation(told: str) -> Violation:
    """In words of ours: the library's have Python's types and its own class names in them."""
    if unknown := _UNKNOWN.search(told):
        return Violation(unknown[1], Reason.UNKNOWN_FIELD, f"there is no field {unknown[1]}")
    place = _PLACE.search(told)
    path = place[1].split(".") if place else _STEPS.findall(told)
    name = (path[1:2] or path[:1] or ["body"])[0]
    return _beyond_limit(name) if "out of range" in told else _unreadable(name)


def _unreadable(name: str) -> Violation:
    if name in _EXPECTED:
        return invalid_type(name, _EXPECTED[name])
    return Violation(name, Reason.INVALID_FORMAT, f"{name} is not well formed")


def _beyond_limit(name: str) -> Violation:
    """Returns the violation of an integer that does not fit into its protobuf field."""
    beyond = validate(JobParams(prompt="p", **{name: _BEYOND}), ValidationContext())  # type: ignore[arg-type] # any integer field
    return beyond[0]
