"""Messages of img2img.v1 as JSON: the proto's own field names, 64-bit integers as strings, bytes as
base64, every field present."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from img2img_server.domain.params import SEED_MAX, Violation
from img2img_server.gateway.contract import FIELDS
from img2img_server.gateway.refusals import Case, RefusedError

_COMPLAINTS = {entry.name: entry.kind.complaint for entry in FIELDS if entry.name != "init_image"}
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
        RefusedError: FIELDS, with the one field that cannot be read or is not known.
    """
    try:
        json_format.ParseDict(body, message)
        return
    # The last two: an infinite enum, a name that is no Unicode text.
    except (json_format.ParseError, OverflowError, SystemError) as error:
        wrong = _violation(str(error))
    # Raised here and without the body, which the errors' frames would keep while they are held.
    del body
    raise RefusedError(Case.FIELDS, violations=[wrong])


def _violation(told: str) -> Violation:
    """In words of ours: the library's have Python's types and its own class names in them."""
    if unknown := _UNKNOWN.search(told):
        return Violation(unknown[1], f"there is no field {unknown[1]}")
    place = _PLACE.search(told)
    path = place[1].split(".") if place else _STEPS.findall(told)
    name = (path[1:2] or path[:1] or ["body"])[0]
    if name == "seed" and "out of range" in told:
        return Violation(name, f"seed must be between 0 and {SEED_MAX}")
    return Violation(name, f"{name} {_COMPLAINTS.get(name, 'is not well formed')}")
