"""Examples of ModelsLab's bodies for the OpenAPI document, built as the gateway builds its own."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.duration_pb2 import Duration

from img2img.v1 import admin_service_pb2, job_pb2, service_pb2
from img2img_server.compat.modelslab import requests, responses

_KEY = {"key": "my-key"}
IMG2IMG = {
    **_KEY,
    "prompt": "a harbour at dusk, oil painting",
    "negative_prompt": "blurry",
    "init_image": "https://files.example.org/harbour.png",
    "width": "768",
    "height": "640",
    "samples": "1",
    "strength": 0.55,
    "seed": 2718281828,
}
_DETAILS = {
    "deploy_type": "realtime",
    "public_url": "https://cdn.example.com/renders/",
    "region_name": "eu-west-1",
    "endpoint_url": "https://my-bucket.s3.amazonaws.com",
    "aws_access_key_id": "AK-EXAMPLE",
    "aws_secret_access_key": "SK-EXAMPLE",
    "image_directory": "renders",
}
_BASE = "https://img.example.com"
_PREFIX = "3f8a1c52-6d0e-4b7a-9c41-5e2d7f90ab16"
_LINK = f"{_BASE}/generations/{_PREFIX}-0.png"
_JOB = job_pb2.Job(
    id=10000041,
    file_prefix=_PREFIX,
    future_urls=[_LINK],
    eta=Duration(seconds=4, nanos=200_000_000),
    timings=job_pb2.Timings(engine=Duration(nanos=830_000_000)),
    error=job_pb2.JobError(message="out of memory at 1024x1024"),
    spec=job_pb2.JobSpec(
        prompt="a harbour at dusk, oil painting",
        negative_prompt="blurry",
        init_image=job_pb2.InitImage(url="https://files.example.org/harbour.png"),
        width=768,
        height=640,
        samples=1,
        strength=0.55,
        seed=2718281828,
        safety_checker=True,
    ),
)
_SYSTEM = admin_service_pb2.GetSystemDetailsResponse(
    server_version="1.0.0",
    uptime=Duration(seconds=477_000),
    model_count=1,
    queued_jobs=2,
    queue_duration=Duration(seconds=3, nanos=400_000_000),
    gpu_usage=0.45,
)
_SUCCEEDED = job_pb2.Job()
_SUCCEEDED.CopyFrom(_JOB)
_SUCCEEDED.state = job_pb2.Job.STATE_SUCCEEDED
_STORED = service_pb2.UpdateStorageSettingsResponse(
    settings=service_pb2.StorageSettings(**_DETAILS)
)
TYPES: dict[Any, Any] = {
    requests.KeyRequest: _KEY,
    requests.FetchRequest: {**_KEY, "request_id": 10000041},
    requests.Img2ImgRequest: IMG2IMG,
    requests.UpdateS3Request: {**_KEY, **_DETAILS},
    requests.ResetS3Request: {**_KEY, "deploy_type": "realtime"},
    responses.Success: responses.success(_JOB, [_LINK]),
    responses.Processing: responses.processing(
        _JOB, f"{_BASE}/api/v1/enterprise/realtime/fetch/10000041", responses.PROCESSING
    ),
    responses.Failed: responses.failed(_JOB),
    responses.WebhookSuccess: json.loads(responses.webhook(_SUCCEEDED, [_LINK])),
    responses.WebhookFailed: json.loads(responses.webhook(_JOB, [])),
    responses.Done: responses.done("update_server"),
    responses.SystemDetails: responses.system_details(_SYSTEM),
    responses.StorageUpdated: responses.storage_updated(_STORED),
    responses.StorageReset: responses.storage_reset("realtime"),
}
# Examples by the name of the schema, including the schemas of /v1.
EXAMPLES: dict[str, Any] = {
    **{each.__name__: example for each, example in TYPES.items()},
    "CreateJobRequest": {
        "spec": {
            "prompt": "an oil painting of a cat",
            "init_image": {"url": "https://files.example.org/cat.jpg"},
            "strength": 0.7,
            "preview_interval_steps": 1,
        }
    },
    "EstimateJobRequest": {"spec": {"prompt": "an oil painting of a cat", "strength": 0.7}},
}
