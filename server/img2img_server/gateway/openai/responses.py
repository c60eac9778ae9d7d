"""Builds the responses and events of OpenAI's API from jobs and their events."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import quote

from fastapi.sse import format_sse_event

from img2img.v1 import event_pb2, job_pb2, service_pb2

JOB_HEADER: Final = "Img2img-Job"
IGNORED_HEADER: Final = "Img2img-Ignored-Fields"
WARNING_HEADER: Final = "Img2img-Warning"
_MAX_NAMES: Final = 20  # of ignored fields in a header
_MAX_NAME_CHARACTERS: Final = 40
# Every response has these values: no model draws transparency or has qualities.
_FIXED: Final = {"quality": "auto", "background": "opaque"}
# OpenAI's clients expect this field in events. No tokens are counted here.
_NO_TOKENS: Final = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def headers(job: job_pb2.Job, ignored: Iterable[str]) -> dict[str, str]:
    """Returns the headers that name the job, the fields without effect, and its warning."""
    found = {JOB_HEADER: str(job.id), **without_effect(ignored)}
    if job.warning:
        found[WARNING_HEADER] = " ".join(job.warning.encode("ascii", "replace").decode().split())
    return found


def without_effect(ignored: Iterable[str]) -> dict[str, str]:
    """Returns the header that names the fields without effect, if there are any."""
    if not (names := list(dict.fromkeys(ignored))):
        return {}
    shown = [quote(name[:_MAX_NAME_CHARACTERS], safe="[]") for name in names[:_MAX_NAMES]]
    return {IGNORED_HEADER: ", ".join(shown + ["..."] * (len(names) > _MAX_NAMES))}


def model(each: service_pb2.Model) -> dict[str, Any]:
    """Returns a model as OpenAI lists it. `created` is 0, since the service does not know it."""
    return {"id": each.name, "object": "model", "created": 0, "owned_by": "img2img"}


def links(job: job_pb2.Job) -> dict[str, Any]:
    """Returns the response with a link to each image."""
    data = [{"url": sample.url, **_of_sample(sample)} for sample in job.samples]
    return _response(job, data, f"{job.spec.width}x{job.spec.height}", "png")


def images(job: job_pb2.Job, found: dict[int, job_pb2.Image]) -> dict[str, Any]:
    """Returns the response with each image in base64, or with its link if it is not in `found`."""
    data = [
        (
            {"b64_json": _base64(found[sample.index])}
            if sample.index in found
            else {"url": sample.url}
        )
        | _of_sample(sample)
        for sample in job.samples
    ]
    image = next(iter(found.values()), job_pb2.Image(media_type="image/png"))
    size = f"{job.spec.width}x{job.spec.height}"
    return _response(job, data, size, _format(image))


def _response(
    job: job_pb2.Job, data: list[dict[str, Any]], size: str, output_format: str
) -> dict[str, Any]:
    return {
        "created": job.create_time.seconds,
        "data": data,
        "size": size,
        "output_format": output_format,
        "background": "opaque",
    }


def _of_sample(sample: job_pb2.Sample) -> dict[str, Any]:
    return {"seed": sample.seed, "nsfw": sample.nsfw}


def completed(job: job_pb2.Job, sample: job_pb2.Sample, image: job_pb2.Image) -> bytes:
    """Returns the event for a finished image."""
    more = {"usage": _NO_TOKENS, **_of_sample(sample), "warning": job.warning, "url": sample.url}
    return _image_event("image_edit.completed", job, image, sample.index, more)


def _image_event(
    kind: str, job: job_pb2.Job, image: job_pb2.Image, index: int, more: dict[str, Any]
) -> bytes:
    data = {
        "type": kind,
        "b64_json": _base64(image),
        "created_at": job.create_time.seconds,
        "size": f"{image.width or job.spec.width}x{image.height or job.spec.height}",
        "output_format": _format(image),
        "image_index": index,
        **_FIXED,
        **more,
    }
    return format_sse_event(data_str=json.dumps(data), event=kind)


def error_event(body: Any) -> bytes:
    """Returns the event for an error after the stream has begun."""
    return format_sse_event(data_str=json.dumps({"type": "error", **body}), event="error")


class PartialImages:
    """Chooses previews, evenly over the steps of each image, as partial images.

    Args:
        wanted: The number for each image. A job of few steps has fewer.
    """

    def __init__(self, job: job_pb2.Job, wanted: int) -> None:
        self._job = job
        self._wanted = wanted
        self._steps: dict[int, int] = {}  # steps that run, by image
        self._sent: Counter[int] = Counter()

    def event(self, event: event_pb2.JobEvent) -> bytes:
        """Returns the event for a preview that is chosen, and b"" for any other event."""
        if event.HasField("step"):
            self._steps[event.step.sample] = event.step.total
        if not event.HasField("preview"):
            return b""
        preview, sent = event.preview, self._sent[event.preview.sample]
        steps = self._steps.get(preview.sample, 0)
        if sent >= self._wanted or preview.step * (self._wanted + 1) < steps * (sent + 1):
            return b""
        self._sent[preview.sample] += 1
        kind, more = "image_edit.partial_image", {"partial_image_index": sent}
        return _image_event(kind, self._job, preview.image, preview.sample, more)


def _base64(image: job_pb2.Image) -> str:
    return base64.b64encode(image.data).decode()


def _format(image: job_pb2.Image) -> str:
    return image.media_type.removeprefix("image/")
