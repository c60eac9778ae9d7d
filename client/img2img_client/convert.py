"""From protobuf to dataclasses. Fields are matched by name, so that one reader serves all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import UTC
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from img2img.v1 import event_pb2, job_pb2
from img2img_client import events
from img2img_client.resources import Job, Spec

T = TypeVar("T")
Getter = Callable[[Any], object]

KINDS: dict[str, type[events.Event]] = {
    "snapshot": events.Snapshot,
    "queued": events.Queued,
    "started": events.Started,
    "stage": events.StageFinished,
    "step": events.StepFinished,
    "preview": events.Preview,
    "sample_finished": events.SampleFinished,
    "sample_stored": events.SampleStored,
    "succeeded": events.Succeeded,
    "failed": events.Failed,
    "cancelled": events.Cancelled,
}


def job_from(message: job_pb2.Job) -> Job:
    """Reads a job."""
    return read(Job, message)


def event_from(message: event_pb2.JobEvent) -> events.Event | None:
    """Reads an event; None when its kind is newer than this client (such may be skipped)."""
    kind = message.WhichOneof("event")
    cls = KINDS.get(kind) if kind is not None else None
    if kind is None or cls is None:
        return None
    envelope = {
        "sequence": message.sequence,
        "event_time": message.event_time.ToDatetime(UTC)
        if message.HasField("event_time")
        else None,
        "job_name": message.job,
    }
    return read(cls, getattr(message, kind), **envelope)


def read(cls: type[T], message: Message, **known: object) -> T:
    """Builds the dataclass from the message's fields of the same names; `known` are given."""
    if cls is Spec:
        known["init_image_url"] = message.init_image.url  # type: ignore[attr-defined]
    plan = _plan(cls, frozenset(known))  # type: ignore[arg-type] # a class is hashable
    values = {name: get(message) for name, get in plan.items()}
    return cls(**known, **values)


@cache
def _plan(cls: type, known: frozenset[str]) -> dict[str, Getter]:
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls) if field.name not in known]
    return {name: _getter(name, hints[name]) for name in names}


def _getter(name: str, hint: Any) -> Getter:
    optional = isinstance(hint, UnionType) and NoneType in get_args(hint)
    if optional:
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    source = name.removesuffix("_seconds")
    if source != name:
        return lambda message: _seconds(message, source, optional)
    if get_origin(hint) is tuple:
        one = _value(get_args(hint)[0])
        return lambda message: tuple(one(message, item, name) for item in getattr(message, name))
    if get_origin(hint) is Mapping:
        return lambda message: dict(getattr(message, name))
    value = _value(hint)
    if optional:
        return lambda message: (
            value(message, getattr(message, name), name) if message.HasField(name) else None
        )
    return lambda message: value(message, getattr(message, name), name)


def _seconds(message: Any, name: str, optional: bool) -> float | None:
    if optional and not message.HasField(name):
        return None
    duration = getattr(message, name)
    return float(duration.seconds + duration.nanos / 1e9)


def _value(hint: Any) -> Callable[[Any, Any, str], object]:
    """The conversion of one value: (its message, the value, its field's name) to the dataclass."""
    if hasattr(hint, "__dataclass_fields__"):
        return lambda _message, item, _name: read(hint, item)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return lambda message, item, name: _enum(hint, message.DESCRIPTOR, name, item)
    if hint.__name__ == "datetime":
        return lambda _message, item, _name: item.ToDatetime(UTC)
    return lambda _message, item, _name: item


def _enum(cls: type[StrEnum], descriptor: Any, field: str, number: int) -> StrEnum:
    by_name: FieldDescriptor = descriptor.fields_by_name[field]
    assert by_name.enum_type is not None
    known = by_name.enum_type.values_by_number.get(number)
    word = known.name.removeprefix(enum_prefix(by_name.enum_type)).lower() if known else ""
    return cls(word) if word in set(cls) else cls("unspecified")


def enum_prefix(descriptor: EnumDescriptor) -> str:
    """Prefix of an enum's values: "ImageFormat" has "IMAGE_FORMAT_"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", descriptor.name).upper() + "_"
