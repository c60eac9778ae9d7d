"""Converts protobuf messages to dataclasses. Fields are matched by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from img2img.v1 import event_pb2
from img2img_client import events
from img2img_client.spec import Spec

T = TypeVar("T")

# The event class of each kind of event that this client knows.
KINDS: dict[str, type[events.Event]] = {
    kind.name: getattr(events, name)
    for kind in event_pb2.JobEvent.DESCRIPTOR.oneofs_by_name["event"].fields
    if kind.message_type and hasattr(events, name := kind.message_type.name.removeprefix("Job"))
}


def event_from(message: event_pb2.JobEvent) -> events.Event | None:
    """Returns the event, or None if this client does not know its kind. Skip such events."""
    kind = message.WhichOneof("event")
    if kind not in KINDS:
        return None
    time = message.event_time.ToDatetime(UTC) if message.HasField("event_time") else None
    envelope = {
        "sequence": message.sequence,
        "event_time": time,
        "job_name": message.job,
        "missing_from": message.missing_from,
    }
    return read(KINDS[kind], getattr(message, kind), **envelope)


def read(cls: type[T], message: Message, **values: object) -> T:
    """Returns a dataclass with the fields of a message; `values` override them."""
    if cls is Spec:
        values["init_image_url"] = message.init_image.url  # type: ignore[attr-defined]
    for name, hint in _fields(cls).items():  # type: ignore[arg-type] # a class is hashable
        if name not in values:
            values[name] = _value(message, name, hint)
    return cls(**values)


@cache
def _fields(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _value(message: Any, name: str, hint: Any) -> object:
    """Returns the message's field as a value of the type `hint`."""
    source = name if name in message.DESCRIPTOR.fields_by_name else name.removesuffix("_seconds")
    if isinstance(hint, UnionType):
        if not message.HasField(source):
            return None
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    value = getattr(message, source)
    if source != name:
        return float(value.seconds + value.nanos / 1e9)
    if get_origin(hint) is Mapping:
        return dict(value)
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return tuple(read(kind, item) if isinstance(item, Message) else item for item in value)
    if hint is datetime:
        return value.ToDatetime(UTC)
    if isinstance(value, Message):
        return read(hint, value)
    if issubclass(hint, StrEnum):
        return _enum(hint, message.DESCRIPTOR.fields_by_name[name].enum_type, value)
    return value


def _enum(cls: type[StrEnum], descriptor: EnumDescriptor, number: int) -> StrEnum:
    known = descriptor.values_by_number.get(number)
    word = known.name.removeprefix(enum_prefix(descriptor)).lower() if known else ""
    return cls(word) if word in set(cls) else cls("unspecified")


def enum_prefix(descriptor: EnumDescriptor) -> str:
    """Returns the prefix of an enum's values: "IMAGE_FORMAT_" for "ImageFormat"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", descriptor.name).upper() + "_"
