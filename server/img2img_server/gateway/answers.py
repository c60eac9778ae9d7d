"""The bodies of the HTTP contract, sections 6 and 8, made of the api's record of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from img2img.v1 import job_pb2
from img2img_server.gateway.request import (
    NOTE_ENHANCE_STYLE,
    NOTE_INSTANT_RESPONSE,
    NOTE_TRACK_ID_TYPE,
)

_UNKNOWN_ETA_SECONDS = 1.0
_OWN_WORDS = {"QUEUE_CLEARED": "Queue cleared"}


def success(job: job_pb2.Job, output: Sequence[str]) -> dict[str, Any]:
    """Section 6.1. `output`: one link, or one base64 string, a sample."""
    return {
        "status": "success",
        "generationTime": round(job.timings.engine.ToNanoseconds() / 1e9, 2),
        "id": job.id,
        "output": list(output),
        "proxy_links": list(output),
        "nsfw_content_detected": any(sample.nsfw for sample in job.samples),
        "webhook_status": job.webhook_status,
        "warning": job.warning,
        "meta": meta(job),
    }


def processing(job: job_pb2.Job, fetch_result: str, message: str) -> dict[str, Any]:
    """Section 6.2."""
    known = job.HasField("eta")
    return {
        "status": "processing",
        "tip": "",
        "eta": round(job.eta.ToNanoseconds() / 1e9, 2) if known else _UNKNOWN_ETA_SECONDS,
        "message": message,
        "fetch_result": fetch_result,
        "id": job.id,
        "output": [],
        "future_links": list(job.future_urls),
        "webhook_status": job.webhook_status,
        "meta": meta(job),
    }


def failure(job: job_pb2.Job) -> str:
    """Why a job failed, as section 6.3 words it."""
    if job.state == job_pb2.Job.STATE_CANCELLED:
        return "Cancelled"
    return _OWN_WORDS.get(job.error.reason, f"Processing failed: {job.error.message}")


def meta(job: job_pb2.Job) -> dict[str, Any]:
    """The 28 keys of section 6.1, always all of them; never the API key."""
    spec = job.spec
    notes = spec.annotations
    return {
        "base64": _yes(spec.base64),
        "enhance_prompt": _yes(spec.enhance_prompt),
        "enhance_style": notes.get(NOTE_ENHANCE_STYLE),
        "file_prefix": job.file_prefix,
        "guidance_scale": _number(spec.guidance_scale) if spec.HasField("guidance_scale") else 1,
        "height": spec.height,
        "id": str(job.id),
        "init_image": spec.init_image.url or "base64",
        "instant_response": _yes(NOTE_INSTANT_RESPONSE in notes),
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
        "track_id": _track_id(spec),
        "watermark": "no",
        "webhook": spec.webhook or None,
        "width": spec.width,
    }


def links(job: job_pb2.Job) -> list[str]:
    """Links to the stored files, in sample order."""
    return [sample.url for sample in sorted(job.samples, key=lambda sample: sample.index)]


def _track_id(spec: job_pb2.JobSpec) -> str | int | None:
    if spec.annotations.get(NOTE_TRACK_ID_TYPE) == "integer":
        return int(spec.track_id)
    return spec.track_id or None


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value
