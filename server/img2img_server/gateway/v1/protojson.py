"""Converts messages of img2img.v1 to and from JSON: the proto's own field names, 64-bit integers as
strings, bytes as base64, every field present.
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from starlette.responses import Response

from img2img.v1 import job_pb2
from img2img_server.domain.params import JobParams, Limits, Lora, ValidationContext, validate
from img2img_server.domain.violations import (
    SHOWN_CHARACTERS,
    Reason,
    Violation,
    invalid_type,
    not_supported,
    out_of_range,
)

_EXPECTED = {
    FieldDescriptor.CPPTYPE_INT32: "an integer",
    FieldDescriptor.CPPTYPE_INT64: "an integer",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_MESSAGE: "an object",
}
_MOST_NOTES = Limits().max_annotations
_MOST_LORAS = Limits().max_loras
_LORAS = 'a list of objects with "name" (a string) and optionally "scale" (a number)'
_INTEGERS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_INTEGER = re.compile(r"-?[0-9]{1,400}", re.ASCII)
_NAME = re.compile(r"\w{1,64}")
# A set of Python: the dict of the library raises SystemError for texts that are not Unicode.
_SPEC_FIELDS = {field.name for field in job_pb2.JobSpec.DESCRIPTOR.fields}
_KEYS = ("key", "api_key", "apikey", "token")
_KEY_IN_QUERY = "a key is never read from the query; send it in a header"
_IN_SPEC = "it is a field of spec, so send it inside the object spec"


def dump(message: Message) -> str:
    """Returns the message on one line."""
    return json_format.MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=None,
    )


def response(message: Message) -> Response:
    """Returns a response with the message."""
    return Response(dump(message), media_type="application/json")


def fill(message: Message, body: dict[str, Any]) -> list[Violation]:
    """Sets the fields of a CreateJobRequest that the body has.

    Returns a violation for every field that is unknown or cannot be read. The fields are parsed one
    by one, so that the failing field is known without reading the library's message.
    """
    kind: Any = message.DESCRIPTOR
    fields = {**kind.fields_by_name, **kind.fields_by_camelcase_name}
    violations = []
    given: set[str] = set()
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            is_in_spec = "spec" in fields and name in _SPEC_FIELDS
            violations.append(unknown(name, _IN_SPEC if is_in_spec else ""))
            continue
        if field.name in given:  # in both spellings
            violations.append(sent_twice(field.name))
            continue
        given.add(field.name)
        if field.name == "spec" and isinstance(value, dict):
            violations += fill(message.spec, value)  # type: ignore[attr-defined]
        elif field.name == "annotations" and isinstance(value, dict) and len(value) > _MOST_NOTES:
            violations += _too_many_notes()  # Conversion would take a second for thousands.
        elif field.name == "loras" and isinstance(value, list) and len(value) > _MOST_LORAS:
            violations += _too_many_loras()  # As with annotations.
        elif field.name == "loras" and isinstance(value, list):
            violations += _fill_loras(message, value)
        elif not _set(message, field, value):
            violations.append(_unreadable(field, value))
    return violations


def _set(message: Message, field: FieldDescriptor, value: Any) -> bool:
    """Sets a field. Returns False for a value of another type."""
    is_number = field.cpp_type in (*_INTEGERS, field.CPPTYPE_DOUBLE, field.CPPTYPE_ENUM)
    if is_number and (isinstance(value, bool) or (isinstance(value, str) and not value.isascii())):
        return False  # The library reads true as 1.
    if field.enum_type and isinstance(value, int) and not -(2**31) <= value < 2**31:
        return False  # The library reads numbers beyond 32 bits as 0.
    if field.enum_type and isinstance(value, float) and not value.is_integer():
        return False  # The library rounds it.
    if field.message_type and not isinstance(value, dict | None):
        return False  # The library accepts a text as a list of names.
    try:
        json_format.ParseDict({field.name: value}, message)
    # The library raises these errors also for infinite enum values and for texts that are not
    # Unicode.
    except (json_format.ParseError, ValueError, OverflowError, SystemError):
        return False
    return True


def _too_many_notes() -> list[Violation]:
    notes = tuple((f"note-{number}", "") for number in range(_MOST_NOTES + 1))
    return validate(JobParams(prompt="p", annotations=notes), ValidationContext())


def _too_many_loras() -> list[Violation]:
    loras = tuple(Lora(f"lora-{number}") for number in range(_MOST_LORAS + 1))
    return validate(JobParams(prompt="p", loras=loras), ValidationContext())


def _fill_loras(message: Message, values: list[Any]) -> list[Violation]:
    for value in values:
        lora = message.loras.add()  # type: ignore[attr-defined]
        if not isinstance(value, dict) or fill(lora, value):
            return [invalid_type("loras", _LORAS)]
    return []


def unknown(name: str, cause: str = "") -> Violation:
    """Returns the violation for a field that does not exist."""
    if not _NAME.fullmatch(name):
        message = f"there is no field {name[:SHOWN_CHARACTERS]!a}"
        return Violation("body", Reason.UNKNOWN_FIELD, message)
    return Violation(name, Reason.UNKNOWN_FIELD, f"there is no field {name}", cause)


def unknown_parameter(name: str) -> Violation:
    """Returns the violation for a parameter of the query that does not exist."""
    return unknown(name, _KEY_IN_QUERY if name in _KEYS else "")


def sent_twice(name: str) -> Violation:
    """Returns the violation for a field that a request has twice."""
    return Violation(name, Reason.TOO_MANY, f"{name} must be sent only once")


def _unreadable(field: FieldDescriptor, value: Any) -> Violation:
    if field.enum_type:
        return not_supported(field.name, [v.name for v in field.enum_type.values if v.number])
    if field.name == "init_image":
        return invalid_type("init_image", 'an object with "url", "data" (base64) or "upload"')
    if field.name == "loras":
        return invalid_type("loras", _LORAS)
    if field.cpp_type in _INTEGERS and _INTEGER.fullmatch(str(value)):
        # The number exceeds 32 or 64 bits.
        if field.containing_type != job_pb2.JobSpec.DESCRIPTOR:
            bits = 32 if field.cpp_type == field.CPPTYPE_INT32 else 64
            return out_of_range(field.name, 1, 2 ** (bits - 1) - 1)  # It is a size.
        params = JobParams(prompt="p", **{field.name: int(value)})  # type: ignore[arg-type]
        return validate(params, ValidationContext())[0]
    return invalid_type(field.name, _EXPECTED[field.cpp_type])
