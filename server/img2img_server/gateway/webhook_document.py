"""Describes the webhook of a job in the OpenAPI document, under `webhooks`."""

from __future__ import annotations

from typing import Any, Final

from img2img_server.compat.modelslab.responses import WebhookFailed, WebhookSuccess

TYPES: Final = (WebhookSuccess, WebhookFailed)
_DESCRIPTION: Final = """The service sends this request to the `webhook` of a job once the job has
succeeded, failed or been cancelled, whichever API created it. Verify the signature with a library
of [Standard Webhooks](https://www.standardwebhooks.com). Deliveries can be repeated and come in any
order: `webhook-id` and `id` identify the job. Failed attempts are retried for several hours."""
_HEADERS: Final = {
    "webhook-id": ("`msg_` and the id of the job; equal in every attempt.", "^msg_[0-9]+$"),
    "webhook-timestamp": ("Unix seconds of this attempt.", "^[0-9]+$"),
    "webhook-signature": (
        "`v1,` and the base64 of HMAC-SHA256 over `{webhook-id}.{webhook-timestamp}.{body}`; "
        "several, separated by a space, while the secret is replaced. Absent if the operator has "
        "set no secret.",
        "^v1,[A-Za-z0-9+/=]+( v1,[A-Za-z0-9+/=]+)*$",
    ),
}
_RESPONSES: Final = {
    "2XX": {"description": "Delivered."},
    "410": {"description": "Not delivered; no further attempt is made."},
    "default": {
        "description": "Not delivered; the attempt is repeated later, with 429 and 503 not before "
        "`Retry-After`. Redirects are not followed."
    },
}


def webhooks(success: dict[str, Any], failed: dict[str, Any]) -> dict[str, Any]:
    """Returns the `webhooks` of the document. `success` and `failed`: examples of the body."""
    references = [{"$ref": f"#/components/schemas/{each.__name__}"} for each in TYPES]
    operation = {
        "summary": "A job has ended",
        "description": _DESCRIPTION,
        "operationId": "job_ended",
        "tags": ["webhooks"],
        "parameters": [
            {
                "name": name,
                "in": "header",
                "required": name != "webhook-signature",
                "description": description,
                "schema": {"type": "string", "pattern": pattern},
            }
            for name, (description, pattern) in _HEADERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"oneOf": references},
                    "examples": {"success": {"value": success}, "failed": {"value": failed}},
                }
            },
        },
        "responses": _RESPONSES,
        "security": [],
    }
    return {"jobEnded": {"post": operation}}
