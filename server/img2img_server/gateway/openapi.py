"""Describes the gateway's API in OpenAPI, at /openapi.json.

FastAPI generates the document from the routes and their types. This module adds errors, API keys
and request bodies, which FastAPI does not know because http/http_request.py reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.examples import EXAMPLES, TYPES
from img2img_server.compat.modelslab.response_formats import Current, ErrorFormat
from img2img_server.compat.modelslab.responses import Error, Legacy
from img2img_server.domain.params import Limits
from img2img_server.domain.violations import required
from img2img_server.gateway import webhook_document
from img2img_server.gateway.openai.schemas import schemas as openai_schemas
from img2img_server.gateway.v1.errors import V1Error
from img2img_server.gateway.v1.schemas import schemas as v1_schemas
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.ports import host_port, reachable
from img2img_server.settings import DEV_KEY, Settings

Schema = dict[str, Any]

_DESCRIPTION = """Images from images, compatible with the enterprise realtime image-to-image API of
ModelsLab. The key goes into the body field `key`, or into one of the headers below. Over gRPC, the
same service streams every denoising step; over HTTP, `/v1/jobs/{job_id}/events` does."""
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "key"},
    "x_api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_IN_HEADER: list[Schema] = [{name: []} for name in _KEYS]
_TOKEN = {
    "type": "apiKey",
    "in": "query",
    "name": "token",
    "description": "A token of one job, see CreateStreamTokenResponse.",
}
WITH_TOKEN: list[Schema] = [*_IN_HEADER, {"stream_token": []}]
_ANYWHERE: list[Schema] = [{}, *_IN_HEADER]  # The key may be in the body instead.
# security requirements by tag
_SECURITY = {
    "img2img": _ANYWHERE,
    "management": _ANYWHERE,
    "jobs": _IN_HEADER,
    "openai": _IN_HEADER,
}
_CURRENT = Current()
BODY = (ErrorKind.INVALID_JSON, ErrorKind.SLOW_BODY, ErrorKind.TOO_LARGE)
_ANY = (ErrorKind.BAD_KEY, ErrorKind.FAULT, ErrorKind.UNAVAILABLE)
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
}


def content(*schemas: str) -> Schema:
    """Returns JSON content whose schema is one of these schemas of the document."""
    refs = [{"$ref": f"#/components/schemas/{schema}"} for schema in schemas]
    return {"application/json": {"schema": refs[0] if len(refs) == 1 else {"oneOf": refs}}}


def body(schema: str, *, required: bool = True) -> Schema:
    """Returns the `openapi_extra` of an operation whose request has a JSON body."""
    return {"requestBody": {"required": required, "content": content(schema)}}


def outcomes(
    *schemas: str,
    errors: Iterable[ErrorKind] = (),
    form: ErrorFormat = _CURRENT,
    schema: str = "Error",
) -> dict[int | str, Schema]:
    """Returns the `responses` of an operation: the response with one of these schemas, and the
    errors.

    Args:
        form: The format of the errors.
        schema: The schema of the errors.
    """
    outcomes: dict[int | str, Schema] = {}
    if schemas:
        outcomes[200] = {"description": "The call succeeded.", "content": content(*schemas)}
    for kind in sorted({*_ANY, *errors}, key=lambda kind: kind.status):
        wrong = [required("prompt")] if kind is ErrorKind.FIELDS else []
        error = RequestError(kind, violations=wrong)
        example, *_ = form.error(error)
        new = {"description": error.message, "content": content(schema)}
        outcome = outcomes.setdefault(kind.status, new)
        shown = outcome["content"]["application/json"].setdefault("examples", {})
        shown[kind.name.lower()] = {"value": example}
        if kind in (ErrorKind.RATE_LIMIT, ErrorKind.UNAVAILABLE):
            outcome["headers"] = _RETRY_AFTER
    return outcomes


_LEGACY = {"description": "Any response; see its `status`.", "content": content("Legacy")}


def document(app: FastAPI, settings: Settings) -> Schema:
    """Returns the document of a gateway with these settings."""
    generated = get_openapi(
        title=app.title,
        version=app.version,
        description=_DESCRIPTION,
        routes=app.routes,
        servers=[{"url": settings.public_base_url or "/"}],
    )
    documented = [*TYPES, Error, V1Error, Legacy]
    adapters: list[Any] = [(each, "validation", TypeAdapter(each)) for each in documented]
    _, types = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    limits = Limits(max_side_pixels=settings.max_side_pixels)
    schemas = types["$defs"] | v1_schemas(limits) | openai_schemas(limits)
    for name, example in EXAMPLES.items():
        schemas[name]["examples"] = [example]
    schemes = _KEYS | {"stream_token": _TOKEN}
    generated["components"] = {"schemas": schemas, "securitySchemes": schemes}
    ended = (EXAMPLES[each.__name__] for each in webhook_document.TYPES)
    generated["webhooks"] = webhook_document.webhooks(*ended)
    for operations in generated["paths"].values():
        for operation in operations.values():
            operation.setdefault("security", _SECURITY.get(operation["tags"][0], []))
            operation["responses"].pop("422", None)
            if settings.legacy and {} in operation["security"]:
                operation["responses"] = {"200": _LEGACY}
            for sent in operation.get("requestBody", {}).get("content", {}).values():
                name = sent["schema"].get("$ref", "").rpartition("/")[2]
                if name in EXAMPLES:
                    sent["example"] = _working(EXAMPLES[name], settings)
    return generated


def _working(example: Schema, settings: Settings) -> Schema:
    """Returns a copy with the development key, and with an init image that can be downloaded, so
    that "Try it out" works unchanged."""
    if not settings.has_open_dev_key or "aws_secret_access_key" in example:
        return example  # "Execute" must not replace a tenant's storage settings by the example.
    changed = example | ({"key": DEV_KEY} if "key" in example else {})
    if "spec" in changed:
        changed["spec"] = _working(changed["spec"], settings)
    address = f"http://{host_port(reachable(settings.http_host), settings.http_port)}"
    url = f"{(settings.public_base_url or address).rstrip('/')}/playground/cat.jpg"
    is_listed = OutboundPolicy.of(settings).lists_host(url)
    can_download = settings.playground and settings.http_port and is_listed
    if can_download and "init_image" in changed:
        changed["init_image"] = {"url": url} if isinstance(changed["init_image"], dict) else url
        changed["prompt"] = "an oil painting of a cat"
    return changed
