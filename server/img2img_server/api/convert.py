"""Conversion between protobuf messages and the domain.

Messages and dataclasses share the names of their fields, so a new field needs no line here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_server.domain import events
from img2img_server.domain.data_uris import NO_IMAGE, decode_data_uri, is_data_uri
from img2img_server.domain.job import Job, State
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import RANDOM_SEED, JobParams, Limits, Lora
from img2img_server.domain.resolve import complete
from img2img_server.domain.schedulers import offered_name
from img2img_server.domain.urls import NotHttpError, UrlError, parse_url
from img2img_server.domain.violations import Violation, not_supported, required
from img2img_server.imaging.base import FetchError, InvalidImageError

M = TypeVar("M", bound=Message)

_UNKNOWN_NAMED = 10
_KINDS = get_type_hints(JobParams)
_EVENTS = {
    events.Queued: "queued",
    events.Started: "started",
    events.StageFinished: "stage",
    events.StepFinished: "step",
    events.Preview: "preview",
    events.SampleFinished: "sample_finished",
    events.SampleStored: "sample_stored",
    events.StorageWaiting: "storage_waiting",
    events.Succeeded: "succeeded",
    events.Failed: "failed",
    events.Cancelled: "cancelled",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A JobSpec in the types of the domain.

    Attributes:
        params: The parameters with the defaults filled in; not validated.
        given: Names of the options that the caller set.
        init_image: The bytes of an inline init image, else empty.
        upload: The name of the upload that is the init image, else empty.
        violations: The values that the domain's types cannot hold.
    """

    params: JobParams
    given: frozenset[str]
    init_image: bytes
    upload: str
    violations: list[Violation]


def request(
    spec: job_pb2.JobSpec,
    model_name: str,
    model: ModelInfo | None,
    limits: Limits,
    *,
    random_seed: int,
) -> Request:
    """Reads a JobSpec: every field that JobParams has under the same name.

    Args:
        model_name: the name of `model`, also where the caller named none.
        model: None if no worker ever announced a model of that name.
        limits: The limits of the service.
    """
    given: dict[str, Any] = {}
    data, violations = b"", []
    try:
        given["init_image_url"], data = _init_image(spec.init_image)
    except InvalidImageError as error:
        violations.append(error.violation)
    for field, value in spec.ListFields():
        name = field.name
        if field.enum_type:
            names = {number: name for name, number in _numbers(field.enum_type).items()}
            if value in names:
                given[name] = _KINDS[name](names[value])
            else:
                violations.append(not_supported(name, _KINDS[name]))
        elif name in _KINDS:
            given[name] = value
    given["loras"] = tuple(
        Lora(lora.name, lora.scale) if lora.HasField("scale") else Lora(lora.name)
        for lora in spec.loras
    )
    given["annotations"] = tuple(sorted(spec.annotations.items()))
    if given.get("seed", RANDOM_SEED) == RANDOM_SEED:
        given["seed"] = random_seed
    if "scheduler" in given:
        offered = model.schedulers if model else ()
        given["scheduler"] = offered_name(spec.scheduler, offered)
    params = complete({**given, "model": model_name}, model, limits)
    upload = spec.init_image.upload
    return Request(params, frozenset(given), data, upload, violations)


def _init_image(image: job_pb2.InitImage) -> tuple[str, bytes]:
    """Returns the URL, or the data of an inline image. Raises InvalidImageError."""
    if image.data:
        return "", image.data
    if image.upload:
        return "", b""
    if not image.url:
        raise InvalidImageError(required("init_image"))
    try:
        if is_data_uri(image.url):
            return "", decode_data_uri(image.url) or NO_IMAGE
        parse_url(image.url)
    except NotHttpError as error:
        raise FetchError("the address does not begin with http://, https:// or data:") from error
    except UrlError as error:
        raise FetchError(f"the address {error}") from error
    except ValueError:  # check_image names the kind of data that is no image.
        return "", image.url[:1024].encode(errors="replace")
    return image.url.strip(), b""


def job(job: Job, *, retention_hours: int, eta_seconds: float | None = None) -> job_pb2.Job:
    """Returns the Job message of a record."""
    message = fill(job_pb2.Job(), job)
    message.spec.CopyFrom(spec(job.params))
    if job.failure:
        fill(message.error, job.failure)
    if job.state.is_terminal:
        expire_time = job.end_time + retention_hours * 3600
        message.expire_time.CopyFrom(timestamp(expire_time))
    else:
        message.ClearField("timings")
        if eta_seconds is not None:
            message.eta.CopyFrom(duration(eta_seconds))
    return message


def spec(params: JobParams) -> job_pb2.JobSpec:
    """Returns the JobSpec of a job, with every default filled in."""
    message = fill(job_pb2.JobSpec(), params)
    if params.init_image_url:
        message.init_image.url = params.init_image_url
    return message


def unknown_fields(spec: job_pb2.JobSpec) -> str:
    """Returns a warning that names fields of a newer version of the protocol, or "" if there are
    none.
    """
    unknown = UnknownFieldSet(spec)
    numbers = {unknown[index].field_number for index in range(len(unknown))}
    if not numbers:
        return ""
    named = ", ".join(map(str, sorted(numbers)[:_UNKNOWN_NAMED]))
    return f"This server does not know the fields {named} of JobSpec and ignored them."


def model(info: ModelInfo, workers: list[WorkerInfo], limits: Limits) -> service_pb2.Model:
    """Returns the Model message of a model. `workers`: all that are announced; `limits`: the limits
    of the service.
    """
    announced = [worker for worker in workers if worker.model.name == info.name]
    serving = [worker for worker in announced if worker.serves]
    loaded = [worker for worker in serving if worker.is_loaded]
    message = fill(fill(service_pb2.Model(), info), info.limits(limits))
    # The greatest limit of all schedulers; scheduler_max_steps has those with a lower limit.
    message.max_num_inference_steps = min(
        info.max_num_inference_steps, limits.max_num_inference_steps
    )
    # Models that skip no layers take every number, without effect.
    message.max_clip_skip = info.max_clip_skip
    message.workers = len(serving)
    message.device = (loaded or serving)[0].device if serving else ""
    states = service_pb2.Model
    cold = states.STATE_COLD if serving else states.STATE_UNSERVED
    message.state = states.STATE_LOADED if loaded else cold
    failures = (f"{worker.name}: {worker.failure}" for worker in announced if worker.failure)
    message.load_failures.extend(failures)
    return message


def fill(message: M, value: object) -> M:
    """Copies every field that a dataclass has under the same name, and returns the message.

    A duration may have the suffix _seconds in the dataclass.

    Seconds become times or durations and enumerations their numbers. None stays absent, and so does
    the time 0.0, at which nothing happened.
    """
    for field in message.DESCRIPTOR.fields:
        content = getattr(value, field.name, getattr(value, f"{field.name}_seconds", None))
        if content is None:
            continue
        if field.enum_type:
            setattr(message, field.name, _numbers(field.enum_type).get(content, 0))
        elif field.message_type is None:
            if field.is_repeated:
                getattr(message, field.name).extend(content)
            else:
                setattr(message, field.name, content)
        elif field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(dict(content))
        elif field.is_repeated:
            for item in content:
                fill(getattr(message, field.name).add(), item)
        elif field.message_type is Timestamp.DESCRIPTOR:
            if content:
                getattr(message, field.name).CopyFrom(timestamp(content))
        elif field.message_type is Duration.DESCRIPTOR:
            getattr(message, field.name).CopyFrom(duration(content))
        else:
            fill(getattr(message, field.name), content)
            getattr(message, field.name).SetInParent()
    return message


@cache
def _numbers(enum: EnumDescriptor) -> dict[str, int]:
    """Returns the numbers of an enumeration by the domain's values: "png" for IMAGE_FORMAT_PNG."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {
        value.name.removeprefix(prefix).lower(): value.number
        for value in enum.values
        if value.number
    }


def states(numbers: Collection[int]) -> set[State]:
    """Returns the states that a request names; numbers of other versions are left out."""
    known = _numbers(job_pb2.Job.State.DESCRIPTOR)
    return {State(name) for name, number in known.items() if number in numbers}


def event(envelope: events.Envelope, job: job_pb2.Job | None = None) -> event_pb2.JobEvent:
    """Returns the message of one log entry. `job`: the whole record, for a terminal event."""
    message = event_pb2.JobEvent(
        sequence=envelope.sequence,
        event_time=timestamp(envelope.time),
        job=f"jobs/{envelope.job_id}",
    )
    content = getattr(message, _EVENTS[type(envelope.event)])
    content.SetInParent()
    fill(content, envelope.event)
    if envelope.is_terminal:
        content.job.CopyFrom(job or job_pb2.Job())
    return message


def snapshot(job: job_pb2.Job, *, sequence: int, time: float) -> event_pb2.JobEvent:
    """Returns the first message of every stream."""
    return event_pb2.JobEvent(
        sequence=sequence,
        event_time=timestamp(time),
        job=job.name,
        snapshot=event_pb2.JobSnapshot(job=job),
    )


def heartbeat(*, sequence: int, time: float, job_name: str = "") -> event_pb2.JobEvent:
    """Returns the message of a stream without new events; `job_name`: empty while unknown."""
    return event_pb2.JobEvent(
        sequence=sequence,
        event_time=timestamp(time),
        job=job_name,
        heartbeat=event_pb2.Heartbeat(),
    )


def timestamp(seconds: float) -> Timestamp:
    """Returns Unix seconds as a Timestamp, to the microsecond."""
    whole = int(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e6) * 1000)


def optional_time(seconds: float | None) -> Timestamp | None:
    """Returns Unix seconds as a Timestamp, or None, which leaves the field unset."""
    return None if seconds is None else timestamp(seconds)


def duration(seconds: float) -> Duration:
    """Returns seconds, at least 0, as a Duration, to the microsecond."""
    whole = int(max(0.0, seconds))
    return Duration(seconds=whole, nanos=int((max(0.0, seconds) - whole) * 1e6) * 1000)
