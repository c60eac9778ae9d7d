"""The JSON bodies of ModelsLab's contract: their types, and functions that build them.

The gateway responds with them, webhooks send them, and the OpenAPI document describes them. See
docs/http-contract.md#responses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from img2img.v1 import admin_service_pb2, job_pb2, service_pb2
from img2img_server.compat.modelslab import names
from img2img_server.domain.job import FIRST_JOB_ID, LAST_JOB_ID

_UNKNOWN_ETA_SECONDS = 1.0
PROCESSING = "Your request is being processed"
_FAILURES = {"QUEUE_CLEARED": "Queue cleared"}

_DONE = {
    "restart_server": "server restarting",
    "update_server": "Server updated successfully",
    "update": "Server updated successfully",
    "clear_cache": "Cache cleared successfully",
    # This is ModelsLab's sentence. No worker restarts.
    "clear_queue": "Queue cleared, server is restarting",
}

YesNo = Literal["yes", "no"]
JobId = Annotated[int, Field(ge=FIRST_JOB_ID, le=LAST_JOB_ID)]
Links = Annotated[list[str], Field(description="One link for each sample, in order.")]
Nothing = Annotated[list[str], Field(max_length=0)]


class Meta(TypedDict):
    """The parameters of a job: always all 28 keys, never the API key."""

    base64: YesNo
    enhance_prompt: YesNo
    enhance_style: str | None
    file_prefix: Annotated[str, Field(json_schema_extra={"format": "uuid"})]
    guidance_scale: float
    height: int
    id: str
    init_image: str
    instant_response: YesNo
    n_samples: int
    negative_prompt: str
    opacity: float
    outdir: str
    padding_down: float
    padding_right: float
    pag_scale: float
    prompt: str
    rescale: YesNo
    safety_checker: YesNo
    safety_checker_type: str
    scale_down: float
    seed: int
    strength: float
    temp: YesNo
    track_id: str | int | None
    watermark: YesNo
    webhook: str | None
    width: int


class Result(TypedDict):
    """The keys that responses and webhooks share for a job that succeeded."""

    status: Literal["success"]
    generationTime: Annotated[float, Field(description="Seconds of computing.")]
    id: JobId
    output: Links
    proxy_links: Links
    nsfw_content_detected: bool


class Success(Result):
    """A job that succeeded."""

    webhook_status: str
    warning: str
    meta: Meta


class Processing(TypedDict):
    """A job that has not ended."""

    status: Literal["processing"]
    tip: str
    eta: Annotated[float, Field(ge=0, description="Seconds.")]
    message: str
    fetch_result: Annotated[str, Field(json_schema_extra={"format": "uri"})]
    id: JobId
    output: Nothing
    future_links: Links
    webhook_status: str
    meta: Meta


class Failed(TypedDict):
    """A job that failed or was cancelled."""

    status: Literal["failed"]
    id: JobId
    message: str
    output: Nothing


class WebhookSuccess(Result):
    """The body of the webhook of a job that succeeded."""

    track_id: str | int | None
    warning: str
    meta: Meta


class WebhookFailed(Failed):
    """The body of the webhook of a job that failed or was cancelled."""

    track_id: str | int | None


class Done(TypedDict):
    """A management call that succeeded."""

    status: Literal["success"]
    message: str


class ServerData(TypedDict):
    """The part `data` of SystemDetails."""

    server_version: str
    uptime: Annotated[str, Field(pattern="^[0-9]+d [0-9]+h [0-9]+m$")]
    gpu_usage: Annotated[str, Field(pattern="^[0-9]+%$")]


class SystemDetails(Done):
    """The state of the service."""

    model_count: Annotated[int, Field(ge=0)]
    queue_num: Annotated[int, Field(ge=0, description="Waiting jobs.")]
    queue_time: Annotated[
        float, Field(ge=0, description="Seconds until the waiting jobs have ended.")
    ]
    data: ServerData


class StorageReset(Done):
    """The service stores the tenant's files again."""

    deploy_type: str


class StorageUpdated(StorageReset):
    """The tenant's S3 details were stored."""

    public_url: str
    image_directory: str
    warning: str


class Error(TypedDict):
    """A request that was refused."""

    status: Literal["error"]
    message: str
    reason: Annotated[
        str,
        Field(
            pattern="^[A-Z][A-Z0-9_]*$",
            description="Machine-readable reason, equal to ErrorInfo.reason over gRPC.",
        ),
    ]
    errors: NotRequired[dict[str, list[str]]]
    retry_after: NotRequired[Annotated[int, Field(ge=1)]]


class Legacy(TypedDict):
    """Any response in legacy mode; `status` is its kind, and the other keys depend on it."""

    status: Literal["success", "processing", "failed", "error"]


def success(job: job_pb2.Job, output: Sequence[str]) -> Success:
    """Returns the body for a job that succeeded.

    Args:
        output: one link, or one base64 string, for each sample.
    """
    return {
        **_result(job, output),
        "webhook_status": job.webhook_status,
        "warning": job.warning,
        "meta": meta(job),
    }


def processing(job: job_pb2.Job, fetch_result: str, message: str) -> Processing:
    """Returns the body for a job that has not ended."""
    has_eta = job.HasField("eta")
    return {
        "status": "processing",
        "tip": "",
        "eta": round(job.eta.ToNanoseconds() / 1e9, 2) if has_eta else _UNKNOWN_ETA_SECONDS,
        "message": message,
        "fetch_result": fetch_result,
        "id": job.id,
        "output": [],
        "future_links": list(job.future_urls),
        "webhook_status": job.webhook_status,
        "meta": meta(job),
    }


def failed(job: job_pb2.Job) -> Failed:
    """Returns the body for a job that failed or was cancelled."""
    return {"status": "failed", "id": job.id, "message": failure(job), "output": []}


def webhook(job: job_pb2.Job, output: Sequence[str]) -> bytes:
    """Returns the body of a webhook for a job that has ended, as JSON without spaces.

    See docs/http-contract.md#webhooks.
    """
    body: dict[str, Any] = {"track_id": track_id(job)}
    if job.state == job_pb2.Job.STATE_SUCCEEDED:
        body = {**_result(job, output), **body, "warning": job.warning, "meta": meta(job)}
    else:
        body = {**failed(job), **body}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def system_details(details: admin_service_pb2.GetSystemDetailsResponse) -> SystemDetails:
    """Returns the body of system_details."""
    hours, seconds = divmod(details.uptime.seconds, 3600)
    days, hours = divmod(hours, 24)
    return {
        "status": "success",
        "message": "",
        "model_count": details.model_count,
        "queue_num": details.queued_jobs,
        "queue_time": round(details.queue_duration.ToNanoseconds() / 1e9, 2),
        "data": {
            "server_version": details.server_version,
            "uptime": f"{days}d {hours}h {seconds // 60}m",
            "gpu_usage": f"{details.gpu_usage:.0%}",
        },
    }


def done(call: str) -> Done:
    """Returns the body of a management call that succeeded; `call`: the last part of its path."""
    return {"status": "success", "message": _DONE[call]}


def storage_updated(response: service_pb2.UpdateStorageSettingsResponse) -> StorageUpdated:
    """Returns the body of update_s3, see docs/http-contract.md#s3-response."""
    return {
        **storage_reset(response.settings.deploy_type),
        "message": "S3 details updated successfully",
        "public_url": response.settings.public_url,
        "image_directory": response.settings.image_directory,
        "warning": response.warning,
    }


def storage_reset(deploy_type: str) -> StorageReset:
    """Returns the body of reset_s3, see docs/http-contract.md#s3-reset."""
    message = "S3 details reset successfully"
    return {"status": "success", "message": message, "deploy_type": deploy_type}


def _result(job: job_pb2.Job, output: Sequence[str]) -> Result:
    return {
        "status": "success",
        "generationTime": round(job.timings.engine.ToNanoseconds() / 1e9, 2),
        "id": job.id,
        "output": list(output),
        "proxy_links": list(output),
        "nsfw_content_detected": any(sample.nsfw for sample in job.samples),
    }


def failure(job: job_pb2.Job) -> str:
    """Returns why a job failed, with the sentences of docs/http-contract.md#failed."""
    if job.state == job_pb2.Job.STATE_CANCELLED:
        return "Cancelled"
    return _FAILURES.get(job.error.reason, f"Processing failed: {job.error.message}")


def meta(job: job_pb2.Job) -> Meta:
    """Returns the parameters of a job, see docs/http-contract.md#meta."""
    spec = job.spec
    annotations = spec.annotations
    return {
        "base64": _yes(spec.base64),
        "enhance_prompt": _yes(spec.enhance_prompt),
        "enhance_style": annotations.get(names.ENHANCE_STYLE),
        "file_prefix": job.file_prefix,
        "guidance_scale": _number(spec.guidance_scale) if spec.HasField("guidance_scale") else 1,
        "height": spec.height,
        "id": str(job.id),
        "init_image": spec.init_image.url or "base64",
        "instant_response": _yes(names.INSTANT_RESPONSE in annotations),
        "n_samples": spec.samples,
        "negative_prompt": spec.negative_prompt,
        "opacity": 1,
        "outdir": "out",
        "padding_down": 0,
        "padding_right": 0,
        "pag_scale": 0,
        "prompt": spec.prompt,
        "rescale": "yes",
        "safety_checker": _yes(spec.safety_checker),
        "safety_checker_type": "black",
        "scale_down": 1,
        "seed": spec.seed,
        "strength": _number(spec.strength),
        "temp": _yes(spec.temp),
        "track_id": track_id(job),
        "watermark": "no",
        "webhook": spec.webhook or None,
        "width": spec.width,
    }


def links(job: job_pb2.Job) -> list[str]:
    """Returns the links to the stored files, in sample order."""
    stored = [sample for sample in job.samples if sample.url]
    return [sample.url for sample in sorted(stored, key=lambda sample: sample.index)]


def track_id(job: job_pb2.Job) -> str | int | None:
    """Returns the caller's reference with its original type, or None if there is none."""
    spec = job.spec
    if spec.annotations.get(names.TRACK_ID_TYPE) == "integer":
        with suppress(ValueError):  # gRPC callers may write any text into this annotation.
            return int(spec.track_id)
    return spec.track_id or None


def _yes(flag: bool) -> YesNo:
    return "yes" if flag else "no"


def _number(value: float) -> float:
    return int(value) if value.is_integer() else value
