"""What sections 6 and 9 say about a job, whatever form it is told in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import annotation_keys

_OWN_WORDS = {"QUEUE_CLEARED": "Queue cleared"}


def result(job: job_pb2.Job, output: Sequence[str]) -> dict[str, Any]:
    """A job that succeeded: what its answers and its webhook begin with.

    `output`: one link, or one base64 string, a sample.
    """
    return {
        "status": "success",
        "generationTime": round(job.timings.engine.ToNanoseconds() / 1e9, 2),
        "id": job.id,
        "output": list(output),
        "proxy_links": list(output),
        "nsfw_content_detected": any(sample.nsfw for sample in job.samples),
    }


def webhook(job: job_pb2.Job, output: Sequence[str]) -> bytes:
    """The body of a webhook, section 9: of a job that has ended, as JSON without spaces."""
    if job.state == job_pb2.Job.STATE_SUCCEEDED:
        extra = {"track_id": track_id(job), "warning": job.warning, "meta": meta(job)}
        body = {**result(job, output), **extra}
    else:
        body = {"status": "failed", "id": job.id, "message": failure(job), "output": []}
        body["track_id"] = track_id(job)
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def failure(job: job_pb2.Job) -> str:
    """Why a job failed, as section 6.3 words it."""
    if job.state == job_pb2.Job.STATE_CANCELLED:
        return "Cancelled"
    return _OWN_WORDS.get(job.error.reason, f"Processing failed: {job.error.message}")


def meta(job: job_pb2.Job) -> dict[str, Any]:
    """The 28 keys of section 6.1, always all of them; never the API key."""
    spec = job.spec
    annotations = spec.annotations
    return {
        "base64": _yes(spec.base64),
        "enhance_prompt": _yes(spec.enhance_prompt),
        "enhance_style": annotations.get(annotation_keys.ENHANCE_STYLE),
        "file_prefix": job.file_prefix,
        "guidance_scale": _number(spec.guidance_scale) if spec.HasField("guidance_scale") else 1,
        "height": spec.height,
        "id": str(job.id),
        "init_image": spec.init_image.url or "base64",
        "instant_response": _yes(annotation_keys.INSTANT_RESPONSE in annotations),
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
    """Links to the stored files, in sample order."""
    return [sample.url for sample in sorted(job.samples, key=lambda sample: sample.index)]


def track_id(job: job_pb2.Job) -> str | int | None:
    """The caller's reference, its type unchanged; None when there was none."""
    spec = job.spec
    if spec.annotations.get(annotation_keys.TRACK_ID_TYPE) == "integer":
        with suppress(ValueError):  # over gRPC anybody may write this annotation
            return int(spec.track_id)
    return spec.track_id or None


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value
