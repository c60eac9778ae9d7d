"""Between protobuf and the domain: jobs and models. Beside it: convert_events, convert_storage."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from img2img.v1 import job_pb2, service_pb2
from img2img_server.domain.data_uris import NO_IMAGE, decode_data_uri, is_data_uri
from img2img_server.domain.job import Determinism, Job, SampleResult, State, Timings
from img2img_server.domain.models import SCHEDULER_OF_CLASS, ModelInfo, WorkerInfo
from img2img_server.domain.params import (
    DEFAULT_STRENGTH,
    RANDOM_SEED,
    ImageFormat,
    JobParams,
    Lane,
    Limits,
)
from img2img_server.domain.urls import NotHttpError, UrlError, parse_url
from img2img_server.domain.violations import Violation, not_supported, required
from img2img_server.imaging.base import FetchError, InvalidImageError

FORMATS = {
    job_pb2.IMAGE_FORMAT_UNSPECIFIED: ImageFormat.JPEG,
    job_pb2.IMAGE_FORMAT_PNG: ImageFormat.PNG,
    job_pb2.IMAGE_FORMAT_JPEG: ImageFormat.JPEG,
    job_pb2.IMAGE_FORMAT_WEBP: ImageFormat.WEBP,
}
LANES = {
    job_pb2.LANE_UNSPECIFIED: Lane.REALTIME,
    job_pb2.LANE_REALTIME: Lane.REALTIME,
    job_pb2.LANE_BATCH: Lane.BATCH,
}
_UNKNOWN_NAMED = 10
# Reversed, so that an unspecified value never comes back.
_FORMATS_OUT = {value: number for number, value in FORMATS.items() if number}
_LANES_OUT = {value: number for number, value in LANES.items() if number}
STATES = {
    State.QUEUED: job_pb2.Job.STATE_QUEUED,
    State.RUNNING: job_pb2.Job.STATE_RUNNING,
    State.SUCCEEDED: job_pb2.Job.STATE_SUCCEEDED,
    State.FAILED: job_pb2.Job.STATE_FAILED,
    State.CANCELLED: job_pb2.Job.STATE_CANCELLED,
}
_DETERMINISM = {
    Determinism.UNKNOWN: job_pb2.DETERMINISM_CLASS_UNSPECIFIED,
    Determinism.EXACT: job_pb2.DETERMINISM_CLASS_EXACT,
    Determinism.BOUNDED: job_pb2.DETERMINISM_CLASS_BOUNDED,
    Determinism.CLOSE: job_pb2.DETERMINISM_CLASS_CLOSE,
}


@dataclass(frozen=True, slots=True)
class Request:
    """A JobSpec as understood: parameters, the inline picture if any, what was wrong already."""

    params: JobParams
    init_image: bytes
    violations: list[Violation]


def request(
    spec: job_pb2.JobSpec, model_name: str, model: ModelInfo | None, *, random_seed: int
) -> Request:
    """Reads a JobSpec. What the domain's types cannot hold is reported as violations.

    Args:
        model_name: the name of `model`, also where the caller named none.
        model: None when no worker ever announced one of that name.
    """
    violations = []
    try:
        url, data = _init_image(spec.init_image)
    except InvalidImageError as error:
        violations.append(error.violation)
        url, data = "", b""
    for name, table in (("output_format", FORMATS), ("lane", LANES)):
        if getattr(spec, name) not in table:
            violations.append(not_supported(name, dict.fromkeys(table.values())))
    default_strength = model.default_strength if model else DEFAULT_STRENGTH
    params = JobParams(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        init_image_url=url,
        width=spec.width if spec.HasField("width") else 512,
        height=spec.height if spec.HasField("height") else 512,
        samples=spec.samples if spec.HasField("samples") else 1,
        strength=spec.strength if spec.HasField("strength") else default_strength,
        seed=spec.seed if spec.HasField("seed") and spec.seed != RANDOM_SEED else random_seed,
        safety_checker=spec.safety_checker if spec.HasField("safety_checker") else True,
        enhance_prompt=spec.enhance_prompt,
        base64=spec.base64,
        temp=spec.temp,
        webhook=spec.webhook,
        track_id=spec.track_id,
        model=model_name,
        num_inference_steps=(
            spec.num_inference_steps if spec.HasField("num_inference_steps") else None
        ),
        guidance_scale=spec.guidance_scale if spec.HasField("guidance_scale") else None,
        scheduler=SCHEDULER_OF_CLASS.get(spec.scheduler, spec.scheduler),
        lora=spec.lora,
        lora_scale=spec.lora_scale if spec.HasField("lora_scale") else 1.0,
        output_format=FORMATS.get(spec.output_format, ImageFormat.JPEG),
        preview_interval_steps=spec.preview_interval_steps,
        lane=LANES.get(spec.lane, Lane.REALTIME),
        annotations=tuple(sorted(spec.annotations.items())),
    )
    return Request(params, data, violations)


def _init_image(image: job_pb2.InitImage) -> tuple[str, bytes]:
    """Returns the URL, or the data of an inline image. Raises InvalidImageError."""
    if image.data:
        return "", image.data
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
    except ValueError:  # check_image says what it is instead of an image
        return "", image.url[:1024].encode(errors="replace")
    return image.url.strip(), b""


def job(job: Job, *, retention_hours: int, eta_seconds: float | None = None) -> job_pb2.Job:
    """A record as callers see it."""
    message = job_pb2.Job(
        name=job.name,
        id=job.id,
        state=STATES[job.state],
        spec=_spec(job.params),
        samples=[_sample(sample) for sample in job.samples],
        future_urls=job.future_urls,
        create_time=timestamp(job.create_time),
        worker=job.worker,
        device=job.device,
        determinism=_DETERMINISM[job.determinism],
        attempt=job.attempt,
        file_prefix=job.file_prefix,
        warning=job.warning,
        original_prompt=job.original_prompt,
        webhook_status=job.webhook_status,
        webhook_error=job.webhook_error,
    )
    if job.failure:
        message.error.reason = job.failure.reason
        message.error.message = job.failure.message
        message.error.retryable = job.failure.retryable
    if job.start_time:
        message.start_time.CopyFrom(timestamp(job.start_time))
    if job.state.is_terminal:
        message.timings.CopyFrom(_timings(job.timings))
        message.end_time.CopyFrom(timestamp(job.end_time))
        message.expire_time.CopyFrom(timestamp(job.end_time + retention_hours * 3600))
    elif eta_seconds is not None:
        message.eta.CopyFrom(duration(eta_seconds))
    return message


def unknown_fields(spec: job_pb2.JobSpec) -> str:
    """Returns a warning that names the fields of a newer version of the protocol; mostly empty."""
    unknown = UnknownFieldSet(spec)
    numbers = {unknown[index].field_number for index in range(len(unknown))}
    if not numbers:
        return ""
    named = ", ".join(map(str, sorted(numbers)[:_UNKNOWN_NAMED]))
    return f"This server does not know the fields {named} of JobSpec and ignored them."


def model(info: ModelInfo, workers: list[WorkerInfo], limits: Limits) -> service_pb2.Model:
    """A model and the workers that serve it now. `limits`: those of the service."""
    serving = [worker for worker in workers if worker.model.name == info.name]
    own = info.limits(limits)
    return service_pb2.Model(
        name=info.name,
        family=info.family,
        schedulers=info.schedulers,
        loras=info.loras,
        default_num_inference_steps=info.default_num_inference_steps,
        default_guidance_scale=info.default_guidance_scale,
        default_strength=info.default_strength,
        native_size=info.native_size,
        workers=len(serving),
        device=serving[0].device if serving else "",
        max_num_inference_steps=own.max_num_inference_steps,
        min_side_pixels=own.min_side_pixels,
        max_side_pixels=own.max_side_pixels,
        side_multiple=own.side_multiple,
    )


def timestamp(seconds: float) -> Timestamp:
    """Unix seconds as a Timestamp, to the microsecond."""
    whole = int(seconds)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e6) * 1000)


def duration(seconds: float) -> Duration:
    """Seconds, at least 0, as a Duration, to the microsecond."""
    whole = int(max(0.0, seconds))
    return Duration(seconds=whole, nanos=int((max(0.0, seconds) - whole) * 1e6) * 1000)


def _spec(params: JobParams) -> job_pb2.JobSpec:
    spec = job_pb2.JobSpec(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        width=params.width,
        height=params.height,
        samples=params.samples,
        strength=params.strength,
        seed=params.seed,
        safety_checker=params.safety_checker,
        enhance_prompt=params.enhance_prompt,
        base64=params.base64,
        temp=params.temp,
        webhook=params.webhook,
        track_id=params.track_id,
        model=params.model,
        scheduler=params.scheduler,
        output_format=_FORMATS_OUT[params.output_format],
        preview_interval_steps=params.preview_interval_steps,
        lane=_LANES_OUT[params.lane],
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        annotations=dict(params.annotations),
    )
    if params.lora:
        spec.lora, spec.lora_scale = params.lora, params.lora_scale
    if params.init_image_url:
        spec.init_image.url = params.init_image_url
    return spec


def _sample(sample: SampleResult) -> job_pb2.Sample:
    return job_pb2.Sample(
        index=sample.index,
        seed=sample.seed,
        url=sample.url,
        sha256=sample.sha256,
        size_bytes=sample.size_bytes,
        nsfw=sample.nsfw,
    )


def _timings(timings: Timings) -> job_pb2.Timings:
    names = [
        "queue",
        "fetch",
        "prepare",
        "encode",
        "denoise",
        "decode",
        "safety",
        "image_encode",
        "upload",
        "engine",
        "total",
    ]
    return job_pb2.Timings(
        steps=timings.steps,
        batch_share=timings.batch_share,
        **{name: duration(getattr(timings, name)) for name in names},
    )
