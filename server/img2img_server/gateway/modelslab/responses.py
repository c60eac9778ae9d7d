"""The bodies of the HTTP contract, sections 6 and 8, made of the api's record of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab.results import meta, result

_UNKNOWN_ETA_SECONDS = 1.0


def success(job: job_pb2.Job, output: Sequence[str]) -> dict[str, Any]:
    """Section 6.1. `output`: one link, or one base64 string, a sample."""
    return {
        **result(job, output),
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
