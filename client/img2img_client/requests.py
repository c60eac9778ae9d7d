"""The options of a request, and the protobuf requests built from them."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from img2img.v1 import job_pb2, service_pb2
from img2img_client.convert import enum_prefix
from img2img_client.errors import (
    InvalidArgumentError,
    InvalidArgumentTypeError,
    Violation,
    invalid,
)
from img2img_client.init_image import read_bytes
from img2img_client.resources import Job
from img2img_client.spec import CreateOptions, ImageSource, Options, StreamOptions
from img2img_client.uploads import Upload

MAX_MESSAGE_BYTES = 34 * 2**20  # bytes; the service's limit, see Limits.max_message_bytes
JOB_NAME = re.compile(r"(?:jobs/)?(\d{1,19})", re.ASCII)

M = TypeVar("M", bound=Message)


_KINDS = {
    FieldDescriptor.CPPTYPE_INT32: "an integer of at most 32 bits",
    FieldDescriptor.CPPTYPE_INT64: "an integer of at most 64 bits",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_STRING: "a str",
    FieldDescriptor.CPPTYPE_MESSAGE: "a mapping of str to str",  # the map of annotations
}


def is_address(text: str) -> bool:
    """Returns whether the text starts with http://, https:// or data:, ignoring case and leading
    white space."""
    return text.lstrip()[:8].lower().startswith(("http://", "https://", "data:"))


def new_job(
    kind: type[M], prompt: str, init_image: ImageSource, options: CreateOptions | StreamOptions
) -> M:
    """Returns the request that creates a job; reads the init image's file.

    Without a request_id one is drawn, so that the request can be repeated.

    Raises:
        InvalidArgumentError: values that do not fit the protocol, all of them. The service checks
            everything else.
        InvalidArgumentTypeError: an option does not exist, or init_image has the wrong type.
        InitImageFileError: the file cannot be read.
    """
    own = {"request_id", "detach"} & set(kind.DESCRIPTOR.fields_by_name)
    if unknown := sorted(set(options) - own - set(get_type_hints(Options))):
        raise InvalidArgumentTypeError(
            *(Violation(name, f"there is no option {name}", "UNKNOWN_FIELD") for name in unknown)
        )
    given = {name: value for name, value in options.items() if value is not None}
    values = {name: given.pop(name) for name in own if name in given}
    values["request_id"] = values.get("request_id") or str(uuid.uuid4())
    return build(kind, spec=_job_spec(prompt, init_image, given), **values)


def estimate(
    prompt: str, init_image: ImageSource | None, options: Options
) -> service_pb2.EstimateJobRequest:
    """Returns the request that estimates a job. Raises the errors of new_job."""
    given = {name: value for name, value in options.items() if value is not None}
    return service_pb2.EstimateJobRequest(spec=_job_spec(prompt, init_image, given))


def _job_spec(
    prompt: str, init_image: ImageSource | None, options: Mapping[str, object]
) -> job_pb2.JobSpec:
    spec = job_pb2.JobSpec()
    violations = _set_fields(spec, {"prompt": prompt, "output_format": "png", **options})
    if init_image is None:
        if violations:
            raise InvalidArgumentError(*violations)
        return spec
    if isinstance(init_image, Upload):
        spec.init_image.upload = init_image.name
    elif isinstance(init_image, str) and is_address(init_image):
        if _set_fields(spec.init_image, {"url": init_image}):
            text = "init_image is a URL with characters that are not valid Unicode"
            violations.append(Violation("init_image", text, "INVALID_URL"))
    else:
        spec.init_image.data = read_bytes(init_image)
    # 2**16 bytes are reserved for the other fields
    size, limit = len(spec.init_image.data), MAX_MESSAGE_BYTES - 2**16
    if size > limit:
        text = f"init_image has {size} bytes, more than the {limit} bytes that fit into a request"
        violations.append(Violation("init_image", text, "TOO_MANY_BYTES"))
    if violations:
        raise InvalidArgumentError(*violations)
    return spec


def create_upload(image: ImageSource) -> service_pb2.CreateUploadRequest:
    """Returns the request that stores an init image; reads its file.

    Raises the errors of new_job.
    """
    if isinstance(image, Upload) or (isinstance(image, str) and is_address(image)):
        kind = "an Upload" if isinstance(image, Upload) else "a URL"
        text = f"{kind} cannot be uploaded: give it to the job itself"
        raise invalid("init_image", "NOT_SUPPORTED", text)
    return service_pb2.CreateUploadRequest(image=read_bytes(image))


def list_jobs(
    states: Sequence[str], page_size: int, request_id: str
) -> service_pb2.ListJobsRequest:
    """Returns the request of the first page. Raises InvalidArgumentError."""
    return build(
        service_pb2.ListJobsRequest,
        page_size=page_size,
        states=[*states],
        request_id=request_id,
    )


def build(kind: type[M], **values: Any) -> M:
    """Returns a request with these fields.

    Raises:
        InvalidArgumentError: values that do not fit the protocol.
    """
    message = kind()
    if violations := _set_fields(message, values):
        raise InvalidArgumentError(*violations)
    return message


def check_seconds(name: str, value: object) -> None:
    """Raises InvalidArgumentError unless `value` is a finite number above 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):  # type: ignore[arg-type,operator]
        text = f"{name} must be a number of seconds above 0, not {value!r}"
        raise invalid(name, "OUT_OF_RANGE" if is_number else "INVALID_TYPE", text)


def deadline(timeout_seconds: float | None) -> float:
    """Returns the end of the timeout on the monotonic clock; infinity without one.

    Raises:
        InvalidArgumentError: it is not a finite number above 0.
    """
    if timeout_seconds is None:
        return math.inf
    check_seconds("timeout_seconds", timeout_seconds)
    return time.monotonic() + timeout_seconds


def watch_job(job: Job | str | int, after_sequence: int) -> service_pb2.WatchJobRequest:
    """Returns the request to follow a job. Raises InvalidArgumentError."""
    return build(service_pb2.WatchJobRequest, name=job_name(job), after_sequence=after_sequence)


def job_name(job: Job | str | int) -> str:
    """Returns "jobs/10000001" for a Job, for that name, for "10000001" or for 10000001.

    Raises:
        InvalidArgumentError: `job` is none of these.
    """
    text = job.name if isinstance(job, Job) else str(job)
    match = JOB_NAME.fullmatch(text)
    if match is None:
        text = f"{text!r} is not the name of a job, such as jobs/10000001 or 10000001"
        raise invalid("name", "INVALID_FORMAT", text)
    return f"jobs/{match[1]}"


def _set_fields(message: Message, values: Mapping[str, Any]) -> list[Violation]:
    """Sets the fields and returns a violation for each value that does not fit its field."""
    violations = []
    for name, value in values.items():
        try:
            if name == "loras":
                message.loras.extend(_loras(value))  # type: ignore[attr-defined]
            elif isinstance(value, Message):
                getattr(message, name).CopyFrom(value)
            elif isinstance(value, Mapping):
                getattr(message, name).update(value)
            elif isinstance(value, list):
                getattr(message, name).extend(_wire(message, name, each) for each in value)
            else:
                setattr(message, name, _wire(message, name, value))
        except (TypeError, ValueError, AttributeError):
            text = f"{name} cannot be {value!r}: it must be {_expected(message, name)}"
            reason = "NOT_SUPPORTED" if _enum(message, name) else "INVALID_TYPE"
            violations.append(Violation(name, text, reason))
    return violations


def _loras(value: Any) -> list[job_pb2.Lora]:
    """Raises TypeError or ValueError for a value of another form."""
    if isinstance(value, str):
        return [job_pb2.Lora(name=value)]
    found = []
    for each in value.items() if isinstance(value, Mapping) else value:
        name, scale = (each, None) if isinstance(each, str) else each
        found.append(job_pb2.Lora(name=name, scale=scale))
    return found


def _enum(message: Message, name: str) -> EnumDescriptor | None:
    return message.DESCRIPTOR.fields_by_name[name].enum_type  # type: ignore[return-value]


def _expected(message: Message, name: str) -> str:
    """Returns a phrase that describes the values of a protobuf field, for an error message."""
    enum = _enum(message, name)
    if name == "loras":
        return "a name, names, names with scales, or a mapping of names to scales"
    if enum is None:
        return _KINDS[message.DESCRIPTOR.fields_by_name[name].cpp_type]
    prefix = enum_prefix(enum)
    words = [value.name.removeprefix(prefix).lower() for value in enum.values if value.number]
    return f"one of {', '.join(words)}"


def _wire(message: Message, name: str, value: Any) -> Any:
    """Returns the value for protobuf; the name of an enum value becomes its number."""
    enum = _enum(message, name)
    if enum is None:
        return value
    word = "jpeg" if value == "jpg" else str(value)
    known = enum.values_by_name.get(enum_prefix(enum) + word.upper())
    if known is None:
        raise ValueError(value)
    return known.number
