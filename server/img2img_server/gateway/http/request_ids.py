"""Reads Idempotency-Key, the header that makes the repetition of a POST safe."""

from __future__ import annotations

import uuid
from typing import Any, Final

import structlog
from starlette.requests import Request

from img2img_server import idempotency
from img2img_server.domain.violations import Reason, Violation

HEADER: Final = "Idempotency-Key"
RESPONSE_HEADER: Final = "X-Request-Id"
INVALID: Final = (
    f"{HEADER} must have 1 to {idempotency.MAX_KEY_CHARACTERS} printable ASCII characters"
)
SCHEMA: Final = {
    "type": "string",
    "pattern": "^[!-~]([ -~]*[!-~])?$",
    "maxLength": idempotency.MAX_KEY_CHARACTERS,
}
# Parts of the OpenAPI operation of a POST that creates a job.
PARAMETERS: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": HEADER,
            "in": "header",
            "description": "Chosen by the caller, for example a UUID: a repeated request with the"
            " same key gets the job of the first one. Default: none, each request creates a job.",
            "schema": SCHEMA,
        }
    ]
}

log = structlog.get_logger()


def find(request: Request, in_body: str = "") -> tuple[str, list[Violation]]:
    """Returns the request_id of the job that the request creates, and violations of the header.

    Without an id in the body and without the header, an id is drawn. The response has the id as
    X-Request-Id. It is logged at once, so that it can be found if the gateway is killed.
    """
    key = request.headers.get(HEADER)
    try:
        found = in_body or (str(uuid.uuid4()) if key is None else idempotency.request_id_of(key))
    except ValueError:
        return "", [Violation(HEADER, Reason.INVALID_FORMAT, INVALID)]
    try:
        request.state.request_id = str(uuid.UUID(found))
    except ValueError:  # The api reports the violation of the field in the body.
        return found, []
    log.info("http_job_requested", request_id=request.state.request_id)
    return found, []
