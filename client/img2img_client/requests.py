"""What a caller may ask for, and the protobuf requests made of it."""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, get_type_hints

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from img2img.v1 import job_pb2, service_pb2
from img2img_client.convert import enum_prefix
from img2img_client.errors import (
    InitImageFileError,
    InitImageNotFoundError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    Violation,
)
from img2img_client.resources import Job, State

# A file or its bytes, an http(s) URL that the service fetches, or a data URI. A str is one of the
# latter two when is_address says so, otherwise a path.
ImageSource = str | os.PathLike[str] | bytes

MAX_MESSAGE_BYTES = 34 * 2**20  # what the service takes, see Limits.max_message_bytes
OTHER_URL = re.compile(r"\s*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
JOB_NAME = re.compile(r"(?:jobs/)?(\d{1,19})", re.ASCII)

M = TypeVar("M", bound=Message)


class Options(TypedDict, total=False):
    """Everything beside prompt and init image. Absent or None: the service's default."""

    negative_prompt: str | None  # what not to show; needs guidance_scale above 1
    width: int | None  # pixels, a multiple of 8, default 512
    height: int | None  # pixels, a multiple of 8, default 512
    samples: int | None  # number of pictures, default 1; picture i uses seed + i
    # 0.0 keeps the init image, 1.0 nothing of it; default: the model's, see capabilities()
    strength: float | None
    seed: int | None  # 0 to 2**63 - 1; absent or -1: drawn at random
    safety_checker: bool | None  # default True
    enhance_prompt: bool | None  # let the service improve the prompt
    base64: bool | None  # store the pictures as base64 text files
    temp: bool | None  # keep the files under temp/ for 24 hours
    webhook: str | None  # https address that gets one POST when the job has ended
    track_id: str | None  # your own reference, returned unchanged
    model: str | None  # see capabilities()
    num_inference_steps: int | None  # of which strength x steps run, and at least one
    guidance_scale: float | None  # 1.0 and below turn guidance off
    scheduler: str | None  # see capabilities()
    lora: str | None  # a LoRA that the model offers
    lora_scale: float | None  # how much of it, default 1.0
    output_format: str | None  # "png" (default of this client), "jpeg" or "webp"
    preview_interval_steps: int | None  # send a Preview every this many steps; 0: never
    lane: str | None  # "realtime" (default) or "batch"
    annotations: Mapping[str, str] | None  # your own notes, returned unchanged


_KINDS = {
    FieldDescriptor.CPPTYPE_INT32: "an integer of at most 32 bits",
    FieldDescriptor.CPPTYPE_INT64: "an integer of at most 64 bits",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_STRING: "a text",
    FieldDescriptor.CPPTYPE_MESSAGE: "a mapping of texts to texts",  # the annotations
}


def is_address(text: str) -> bool:
    """Returns whether the text begins with http://, https:// or data:, in any case.

    White space before it does not count.
    """
    return text.lstrip()[:8].lower().startswith(("http://", "https://", "data:"))


def job_spec(prompt: str, init_image: ImageSource, options: Options) -> job_pb2.JobSpec:
    """Builds the spec; reads the init image's file.

    Raises:
        InvalidArgumentError: values that do not fit the protocol, all of them; the service checks
            everything else.
        InvalidArgumentTypeError: an option does not exist, or init_image is none of the three.
        InitImageFileError: the file cannot be read.
    """
    unknown = sorted(set(options) - set(get_type_hints(Options)))
    if unknown:
        violations = [Violation(name, f"there is no option {name}") for name in unknown]
        raise InvalidArgumentTypeError(*violations)
    spec = job_pb2.JobSpec()
    values: dict[str, Any] = {"prompt": prompt, "output_format": "png", **_given(options)}
    violations = _set_fields(spec, values)
    if isinstance(init_image, str) and is_address(init_image):
        if _set_fields(spec.init_image, {"url": init_image}):
            text = "init_image is a URL with characters that are no Unicode text"
            violations.append(Violation("init_image", text))
    else:
        spec.init_image.data = _bytes(init_image)
    if len(spec.init_image.data) > MAX_MESSAGE_BYTES - 2**16:  # room for everything else
        size, most = len(spec.init_image.data) / 2**20, MAX_MESSAGE_BYTES / 2**20
        text = (
            f"init_image of {size:.0f} MiB is too large: a whole request has up to {most:.0f} MiB"
        )
        violations.append(Violation("init_image", text))
    if violations:
        raise InvalidArgumentError(*violations)
    return spec


def build(kind: type[M], **values: Any) -> M:
    """A request with these fields.

    Raises:
        InvalidArgumentError: values that do not fit the protocol.
    """
    message = kind()
    if violations := _set_fields(message, values):
        raise InvalidArgumentError(*violations)
    return message


def check_seconds(name: str, value: object) -> None:
    """Raises InvalidArgumentError unless `value` is a time to wait."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):  # type: ignore[arg-type,operator]
        text = f"{name} must be a number of seconds above 0, not {value!r}"
        raise InvalidArgumentError(Violation(name, text))


def generate_request(
    prompt: str,
    init_image: ImageSource,
    options: Options,
    *,
    request_id: str | None,
    detach: bool,
) -> service_pb2.GenerateRequest:
    """Request of Generate; draws a request_id when none is given, so that it may be repeated."""
    return build(
        service_pb2.GenerateRequest,
        spec=job_spec(prompt, init_image, options),
        request_id=request_id or str(uuid.uuid4()),
        detach=detach,
    )


def create_request(
    prompt: str, init_image: ImageSource, options: Options, *, request_id: str | None
) -> service_pb2.CreateJobRequest:
    """Request of CreateJob; draws a request_id when none is given, so that it may be repeated."""
    return build(
        service_pb2.CreateJobRequest,
        spec=job_spec(prompt, init_image, options),
        request_id=request_id or str(uuid.uuid4()),
    )


def watch_request(job: Job | str | int, after_sequence: int) -> service_pb2.WatchJobRequest:
    """Request of WatchJob."""
    return build(service_pb2.WatchJobRequest, name=job_name(job), after_sequence=after_sequence)


def list_request(states: Sequence[State | str], page_size: int) -> service_pb2.ListJobsRequest:
    """Request of the first page.

    Raises:
        InvalidArgumentError: a state does not exist, or page_size is no such number.
    """
    numbers = []
    for state in states:
        try:
            numbers.append(job_pb2.Job.State.Value(f"STATE_{State(state).name}"))
        except ValueError as error:
            known = ", ".join(one for one in State if one is not State.UNSPECIFIED)
            text = f"there is no state {state!r}; the states are {known}"
            raise InvalidArgumentError(Violation("states", text)) from error
    return build(service_pb2.ListJobsRequest, page_size=page_size, states=numbers)


def job_name(job: Job | str | int) -> str:
    """ "jobs/10000001" from a Job, that name, "10000001" or 10000001.

    Raises:
        InvalidArgumentError: it is none of these.
    """
    text = job.name if isinstance(job, Job) else str(job)
    match = JOB_NAME.fullmatch(text)
    if match is None:
        text = f"{text!r} names no job; a job is jobs/10000001 or 10000001"
        raise InvalidArgumentError(Violation("name", text))
    return f"jobs/{match[1]}"


def _given(options: Options) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _set_fields(message: Message, values: Mapping[str, Any]) -> list[Violation]:
    """Sets the fields and returns what does not fit them."""
    violations = []
    for name, value in values.items():
        try:
            if isinstance(value, Message):
                getattr(message, name).CopyFrom(value)
            elif isinstance(value, Mapping):
                getattr(message, name).update(value)
            elif isinstance(value, list):
                getattr(message, name).extend(value)
            else:
                setattr(message, name, _wire(message, name, value))
        except (TypeError, ValueError, AttributeError):
            expected = _expected(message, name)
            violations.append(Violation(name, f"{name} cannot be {value!r}: it must be {expected}"))
    return violations


def _expected(message: Message, name: str) -> str:
    """Returns the values that the protobuf field takes, as a phrase."""
    described = message.DESCRIPTOR.fields_by_name[name]
    enum: EnumDescriptor | None = described.enum_type  # type: ignore[assignment]
    if enum is None:
        return _KINDS[described.cpp_type]
    prefix = enum_prefix(enum)
    words = [value.name.removeprefix(prefix).lower() for value in enum.values if value.number]
    return f"one of {', '.join(words)}"


def _wire(message: Message, name: str, value: Any) -> Any:
    """The value as protobuf wants it: an enum's word becomes its number."""
    enum: EnumDescriptor | None = message.DESCRIPTOR.fields_by_name[name].enum_type  # type: ignore[assignment]
    if enum is None:
        return value
    word = "jpeg" if value == "jpg" else str(value)
    known = enum.values_by_name.get(enum_prefix(enum) + word.upper())
    if known is None:
        raise ValueError(value)
    return known.number


def _bytes(source: ImageSource) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        text = f"init_image must be a path, bytes or a URL, not {type(source).__name__}"
        raise InvalidArgumentTypeError(Violation("init_image", text))
    path = _path(source)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InitImageNotFoundError(path, error) from error
    except OSError as error:
        raise InitImageFileError(path, error) from error
    except ValueError as error:  # a NUL in the path
        raise _wrong_image(f"init_image {str(path)!r} is no path: {error}") from error
    if not data:
        raise _wrong_image(f"the init image {path} is an empty file")
    return data


def _path(source: str | os.PathLike[str]) -> Path:
    if isinstance(source, str) and OTHER_URL.match(source):
        raise _wrong_image(
            f"init_image {source!r} cannot be fetched: a URL begins with http://, https:// or "
            "data:, and a file is given by its path"
        )
    if isinstance(source, str) and not source.strip():
        raise _wrong_image("init_image is an empty text, neither a path nor a URL")
    try:
        return Path(source).expanduser()
    except RuntimeError:  # there is no such user
        return Path(source)


def _wrong_image(text: str) -> InvalidArgumentError:
    return InvalidArgumentError(Violation("init_image", text))
