"""Reads POST /v1/jobs and /v1/jobs:estimate: JSON, a form, or the init image as the whole body.

The fields of the spec may be in the query too, whatever the body is: an image has no other place
for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from starlette.requests import Request

from img2img.v1 import job_pb2, service_pb2
from img2img_server.compat.modelslab.requests import init_image
from img2img_server.domain.violations import Violation, invalid_type
from img2img_server.gateway.http import forms
from img2img_server.gateway.http.http_request import media_type_of, read_body, read_json
from img2img_server.gateway.v1 import protojson

IMAGE_TYPES: Final = "image/"
TAKES: Final = f"application/json, {forms.MEDIA_TYPE} or an image (Content-Type: image/*)"
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
_SPEC: Final = job_pb2.JobSpec.DESCRIPTOR
# A dict of Python: that of the library raises SystemError for texts that are not Unicode.
_CANONICAL: Final = {field.camelcase_name: field.name for field in _SPEC.fields}
_TEXT_FIELDS: Final = {*_SPEC.fields_by_name, "request_id", "upload"}
_MAX_JSON_CHARACTERS: Final = 2**18  # characters; enough for the longest annotations, all escaped


@dataclass(slots=True)
class JobRequest:
    """A request to create or to estimate a job.

    Attributes:
        key: The key in the body: None if there is none, or a value that is no text.
        create: The fields that could be read.
        violations: A violation for each field that could not be read.
    """

    key: Any = None
    create: service_pb2.CreateJobRequest = field(default_factory=service_pb2.CreateJobRequest)
    violations: list[Violation] = field(default_factory=list)
    given: set[str] = field(default_factory=set)


async def read(request: Request) -> JobRequest:
    """Reads the body and the query.

    Raises:
        RequestError: The body is none of the three kinds, too large or too slow.
        ClientDisconnect: The client closed the connection.
    """
    found = JobRequest()
    media_type = media_type_of(request)
    if media_type == forms.MEDIA_TYPE:
        _take_form(found, await forms.read_form(request))
    elif media_type.startswith(IMAGE_TYPES):
        found.create.spec.init_image.data = bytes(await read_body(request))
        found.given.add("init_image")
    else:
        _take_json(found, await read_json(request, takes=TAKES, unique=True))
    _take_texts(found, request.query_params.multi_items(), protojson.unknown_parameter)
    return found


def _take_json(found: JobRequest, sent: dict[str, Any]) -> None:
    found.key = sent.pop("key", None)
    spec = sent.get("spec")
    for name in (*sent, *(spec if isinstance(spec, dict) else ())):
        found.given.add(_canonical(name))
    found.violations += protojson.fill(found.create, sent)


def _take_form(found: JobRequest, parts: list[forms.Part]) -> None:
    texts: list[tuple[str, str]] = []
    while parts:
        part = parts.pop(0)  # The bytes of each part are freed once they are in the job.
        if part.name == "init_image" and part.is_file:
            if part.content and _is_new(found, part.name):
                found.create.spec.init_image.data = part.content
            continue
        try:
            texts.append((part.name, part.text()))
        except ValueError:
            is_known = _canonical(part.name) in _TEXT_FIELDS
            wrong = invalid_type(part.name, "text in UTF-8")
            found.violations.append(wrong if is_known else protojson.unknown(part.name))
    found.key = next((text for name, text in texts if name == "key"), None)
    _take_texts(found, [(name, text) for name, text in texts if name != "key"])


def _take_texts(
    found: JobRequest,
    texts: Iterable[tuple[str, str]],
    unknown: Callable[[str], Violation] = protojson.unknown,
) -> None:
    """Sets fields of the spec, and request_id, from texts. An empty text equals an absent field."""
    values: dict[str, Any] = {}
    for sent, text in texts:
        name = _canonical(sent)
        if name not in _TEXT_FIELDS:
            found.violations.append(unknown(sent))
        elif not text or not _is_new(found, name):
            continue
        elif name == "request_id":
            found.create.request_id = text
        elif name == "upload":
            if _is_new(found, "init_image"):
                found.create.spec.init_image.upload = text
        elif name == "init_image":
            found.create.spec.init_image.CopyFrom(init_image(text))
        else:
            values[name] = _value(_SPEC.fields_by_name[name], text)
    found.violations += protojson.fill(found.create.spec, values)


def _is_new(found: JobRequest, name: str) -> bool:
    """Notes that the field was sent. Returns False, and adds a violation, if it was sent before."""
    if name not in found.given:
        found.given.add(name)
        return True
    found.violations.append(protojson.sent_twice(name))
    return False


def _canonical(name: str) -> str:
    return _CANONICAL.get(name, name)


def _value(field: FieldDescriptor, text: str) -> Any:
    """Returns the JSON value of a text. protojson reads numbers and names from texts by itself."""
    if field.cpp_type == field.CPPTYPE_BOOL:
        return _BOOLEANS.get(text.strip().lower(), text)
    if field.message_type and len(text) <= _MAX_JSON_CHARACTERS:
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    return text
