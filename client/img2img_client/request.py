"""What a caller may ask for, and the protobuf requests made of it."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from img2img.v1 import job_pb2, service_pb2
from img2img_client.convert import enum_prefix
from img2img_client.errors import InvalidRequestError, Violation
from img2img_client.resources import Job, State

# A file or its bytes, or an http(s) address that the service fetches. A str is an address when it
# begins with http:// or https://, otherwise a path.
ImageSource = str | os.PathLike[str] | bytes

MAX_MESSAGE_BYTES = 34 * 2**20  # what the service takes, see Limits.max_message_bytes
JOB_NAME = re.compile(r"(?:jobs/)?(\d{1,19})")


class Options(TypedDict, total=False):
    """Everything beside prompt and init image. Absent or None: the service's default."""

    negative_prompt: str | None  # what not to show; needs guidance_scale above 1
    width: int | None  # pixels, a multiple of 8, default 512
    height: int | None  # pixels, a multiple of 8, default 512
    samples: int | None  # number of pictures, default 1; picture i uses seed + i
    strength: float | None  # 0.0 keeps the init image, 1.0 nothing of it; default 0.7
    seed: int | None  # 0 to 2**32 - 1; absent: drawn at random
    safety_checker: bool | None  # default True
    enhance_prompt: bool | None  # let the service improve the prompt
    base64: bool | None  # store the pictures as base64 text files
    temp: bool | None  # keep the files under temp/ for 24 hours
    webhook: str | None  # https address that gets one POST when the job has ended
    track_id: str | None  # your own reference, returned unchanged
    model: str | None  # see capabilities()
    num_inference_steps: int | None  # of which about strength x steps run
    guidance_scale: float | None  # 1.0 and below turn guidance off
    scheduler: str | None  # see capabilities()
    lora: str | None  # a LoRA that the model offers
    lora_scale: float | None  # how much of it, default 1.0
    output_format: str | None  # "png" (default of this client), "jpeg" or "webp"
    preview_interval_steps: int | None  # send a Preview every this many steps; 0: never
    lane: str | None  # "realtime" (default) or "batch"
    annotations: Mapping[str, str] | None  # your own notes, returned unchanged


def job_spec(prompt: str, init_image: ImageSource, options: Options) -> job_pb2.JobSpec:
    """Builds the spec; reads the init image's file.

    Raises:
        TypeError: an option does not exist.
        InvalidRequestError: values that do not fit the protocol, all of them; the service checks
            everything else.
        OSError: the file cannot be read.
    """
    unknown = sorted(set(options) - set(get_type_hints(Options)))
    if unknown:
        raise TypeError(f"there is no option {', '.join(unknown)}")
    spec = job_pb2.JobSpec()
    violations = []
    values: dict[str, Any] = {"prompt": prompt, "output_format": "png", **_given(options)}
    for name, value in values.items():
        try:
            if name == "annotations":
                spec.annotations.update(value)
            else:
                setattr(spec, name, _wire(name, value))
        except (TypeError, ValueError):
            violations.append(Violation(name, f"{name} cannot be {value!r}"))
    if isinstance(init_image, str) and init_image.startswith(("http://", "https://")):
        spec.init_image.url = init_image
    else:
        spec.init_image.data = _bytes(init_image)
    if len(spec.init_image.data) > MAX_MESSAGE_BYTES - 2**16:  # room for everything else
        size = len(spec.init_image.data) / 2**20
        violations.append(Violation("init_image", f"init_image of {size:.0f} MiB is too large"))
    if violations:
        text = "; ".join(violation.description for violation in violations)
        raise InvalidRequestError(
            text, code="INVALID_ARGUMENT", reason="INVALID_REQUEST", violations=tuple(violations)
        )
    return spec


def generate_request(
    prompt: str,
    init_image: ImageSource,
    options: Options,
    *,
    request_id: str | None,
    detach: bool,
) -> service_pb2.GenerateRequest:
    """Request of Generate; draws a request_id when none is given, so that it may be repeated."""
    return service_pb2.GenerateRequest(
        spec=job_spec(prompt, init_image, options),
        request_id=request_id or str(uuid.uuid4()),
        detach=detach,
    )


def create_request(
    prompt: str, init_image: ImageSource, options: Options, *, request_id: str | None
) -> service_pb2.CreateJobRequest:
    """Request of CreateJob; draws a request_id when none is given, so that it may be repeated."""
    return service_pb2.CreateJobRequest(
        spec=job_spec(prompt, init_image, options), request_id=request_id or str(uuid.uuid4())
    )


def watch_request(job: Job | str | int, after_sequence: int) -> service_pb2.WatchJobRequest:
    """Request of WatchJob."""
    return service_pb2.WatchJobRequest(name=job_name(job), after_sequence=after_sequence)


def list_request(states: Sequence[State | str], page_size: int) -> service_pb2.ListJobsRequest:
    """Request of the first page; ValueError when a state does not exist."""
    numbers = [job_pb2.Job.State.Value(f"STATE_{State(state).name}") for state in states]
    return service_pb2.ListJobsRequest(page_size=page_size, states=numbers)


def job_name(job: Job | str | int) -> str:
    """ "jobs/10000001" from a Job, that name, "10000001" or 10000001.

    Raises:
        ValueError: it is none of these.
    """
    text = job.name if isinstance(job, Job) else str(job)
    match = JOB_NAME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} names no job; a job is jobs/10000001 or 10000001")
    return f"jobs/{match[1]}"


def _given(options: Options) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _wire(name: str, value: Any) -> Any:
    """The value as protobuf wants it: an enum's word becomes its number."""
    enum = job_pb2.JobSpec.DESCRIPTOR.fields_by_name[name].enum_type
    if enum is None:
        return value
    word = "jpeg" if value == "jpg" else str(value)
    known = enum.values_by_name.get(enum_prefix(enum) + word.upper())
    if known is None:
        raise ValueError(value)
    return known.number


def _bytes(source: ImageSource) -> bytes:
    return bytes(source) if isinstance(source, bytes) else Path(source).expanduser().read_bytes()
