"""Examples of the contract's bodies, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from img2img_server.gateway.modelslab import management, storage
from img2img_server.gateway.modelslab.errors import ErrorKind

_META_EXAMPLE = {
    "base64": "no",
    "enhance_prompt": "no",
    "enhance_style": None,
    "file_prefix": "3f8a1c52-6d0e-4b7a-9c41-5e2d7f90ab16",
    "guidance_scale": 1,
    "height": 640,
    "id": "10000041",
    "init_image": "https://files.example.org/harbour.png",
    "instant_response": "no",
    "n_samples": 1,
    "negative_prompt": "blurry",
    "opacity": 1,
    "outdir": "out",
    "padding_down": 0,
    "padding_right": 0,
    "pag_scale": 0,
    "prompt": "a harbour at dusk, oil painting",
    "rescale": "yes",
    "safety_checker": "yes",
    "safety_checker_type": "black",
    "scale_down": 1,
    "seed": 2718281828,
    "strength": 0.55,
    "temp": "no",
    "track_id": None,
    "watermark": "no",
    "webhook": None,
    "width": 768,
}
_LINK = "https://img.example.com/generations/3f8a1c52-6d0e-4b7a-9c41-5e2d7f90ab16-0.png"
REQUEST_EXAMPLE = {
    "key": "my-key",
    "prompt": "a harbour at dusk, oil painting",
    "negative_prompt": "blurry",
    "init_image": "https://files.example.org/harbour.png",
    "width": "768",
    "height": "640",
    "samples": "1",
    "strength": 0.55,
    "seed": 2718281828,
}
JOB_EXAMPLES = {
    "success": {
        "status": "success",
        "generationTime": 0.83,
        "id": 10000041,
        "output": [_LINK],
        "proxy_links": [_LINK],
        "nsfw_content_detected": False,
        "webhook_status": "",
        "warning": "",
        "meta": _META_EXAMPLE,
    },
    "processing": {
        "status": "processing",
        "tip": "",
        "eta": 4.2,
        "message": "Your request is being processed",
        "fetch_result": "https://img.example.com/api/v1/enterprise/realtime/fetch/10000041",
        "id": 10000041,
        "output": [],
        "future_links": [_LINK],
        "webhook_status": "",
        "meta": _META_EXAMPLE,
    },
    "failed": {
        "status": "failed",
        "id": 10000041,
        "message": "Processing failed: out of memory at 1024x1024",
        "output": [],
    },
}

MANAGEMENT_EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "system_details": (
        "How the service is doing",
        {
            "status": "success",
            "message": "",
            "model_count": 1,
            "queue_num": 2,
            "queue_time": 3.4,
            "data": {"server_version": "1.0.0", "uptime": "5d 12h 30m", "gpu_usage": "45%"},
        },
    ),
    "restart_server": (
        "Restart the workers; running jobs go back to the queue",
        {"status": "success", "message": management.RESTARTING},
    ),
    "update_server": (
        "Read configuration and model files again",
        {"status": "success", "message": management.UPDATED},
    ),
    "update": (
        "The same as update_server",
        {"status": "success", "message": management.UPDATED},
    ),
    "clear_cache": (
        "Empty the workers' caches",
        {"status": "success", "message": management.CACHE_CLEARED},
    ),
    "clear_queue": (
        "End the tenant's waiting jobs as failed; no worker restarts",
        {"status": "success", "message": management.QUEUE_CLEARED},
    ),
}

# Summary, schema of the body, body, answer.
STORAGE_EXAMPLES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "update_s3": (
        "Have results stored in your own S3 bucket from now on",
        "UpdateS3Request",
        {
            "key": "my-key",
            "deploy_type": "realtime",
            "public_url": "https://cdn.example.com/renders/",
            "region_name": "eu-west-1",
            "endpoint_url": "https://my-bucket.s3.amazonaws.com",
            "aws_access_key_id": "AK-EXAMPLE",
            "aws_secret_access_key": "SK-EXAMPLE",
            "image_directory": "renders",
        },
        {
            "status": "success",
            "message": storage.UPDATED,
            "deploy_type": "realtime",
            "public_url": "https://cdn.example.com/renders/",
            "image_directory": "renders",
            "warning": "",
        },
    ),
    "reset_s3": (
        "Have results stored by this service again",
        "ResetS3Request",
        {"key": "my-key", "deploy_type": "realtime"},
        {"status": "success", "message": storage.RESET, "deploy_type": "realtime"},
    ),
}


def error_example(case: ErrorKind) -> dict[str, Any]:
    """What a refusal looks like."""
    body: dict[str, Any] = {
        "status": "error",
        "message": case.message,
        "reason": case.reason,
    }
    if case is ErrorKind.FIELDS:
        sentence = "width must be divisible by 8"
        body |= {"message": sentence, "errors": {"width": [sentence]}}
    if case is ErrorKind.RATE_LIMIT:
        sentence = "Rate limit exceeded. Maximum 15 queued requests allowed."
        body |= {"message": sentence, "reason": "QUEUE_FULL", "retry_after": 30}
    return body
