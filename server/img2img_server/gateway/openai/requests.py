"""Reads requests of OpenAI's image edits: JSON and forms, their fields, and the job they mean.

Values are read by the rules of /v1 (v1/protojson.py), which reads numbers in strings, as forms have
them. The api checks the limits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import names
from img2img_server.compat.modelslab.requests import init_image
from img2img_server.domain.params import ImageFormat
from img2img_server.domain.violations import (
    Reason,
    Violation,
    invalid_type,
    not_supported,
    out_of_range,
    required,
)
from img2img_server.gateway.http import forms
from img2img_server.gateway.http.http_request import media_type_of, read_json, unsupported
from img2img_server.gateway.openai.errors import renamed
from img2img_server.gateway.v1 import protojson

MAX_PARTIAL_IMAGES: Final = 3
# The strength of `input_fidelity=high`; low is the model's default strength.
HIGH_FIDELITY_STRENGTH: Final = 0.4
# Fields of OpenAI's requests under their names in JobSpec.
_IN_SPEC: Final = {"prompt": "prompt", "model": "model", "n": "samples"}
# Further fields of JobSpec that a request can have, under the same name.
EXTRA: tuple[str, ...] = (
    "strength",
    "seed",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "scheduler",
)
_IMAGES: Final = ("image", "image[]", "images", "url")
_FORMATS: Final = tuple(ImageFormat)
_LINKS: Final = ("b64_json", "url")
_FIDELITIES: Final = ("low", "high")
# Values that ask for what every response has. Any other value of these fields has no effect.
_FIXED: Final = {"quality": ("auto",), "background": ("auto", "opaque"), "moderation": ("auto",)}
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
_SIZE: Final = re.compile(r"([0-9]{1,5})x([0-9]{1,5})", re.ASCII)
_LORA_FIELD: Final = re.compile(r"loras\[([^\[\]].*)\]")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_ONE_IMAGE: Final = "Only one image can be edited at a time: the models take no reference images"
_NO_MASK: Final = "mask is not supported: the whole image is edited"
_NO_FILE_ID: Final = "file_id is not supported: send image_url"


@dataclass(slots=True)
class Edit:
    """A request to edit an image.

    Attributes:
        spec: The job.
        links: Whether the response has links instead of base64.
        stream: Whether the response is a stream of events.
        partial_images: Number of previews of each image in the stream.
        ignored: Names of the fields that have no effect.
        violations: Every broken rule that was found before the job was created.
    """

    spec: job_pb2.JobSpec = field(default_factory=job_pb2.JobSpec)
    links: bool = False
    stream: bool = False
    partial_images: int = 0
    ignored: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


async def read(request: Request, link_base: str) -> Edit:
    """Reads the body as a form or as JSON.

    Raises:
        RequestError: the body is neither, is too large or too slow.
        ClientDisconnect: the client closed the connection.
    """
    media_type = media_type_of(request)
    if media_type == forms.MEDIA_TYPE:
        fields, images, violations = _of_form(await forms.read_form(request))
    elif media_type in ("", "text/plain") or media_type.endswith("json"):
        fields, images, violations = _of_json(await read_json(request, unique=True))
    else:
        raise unsupported(request, f"{forms.MEDIA_TYPE} or application/json")
    edit = Edit(violations=violations)
    edit.ignored += request.query_params  # None has an effect: Azure's clients send api-version.
    _fill(edit, {name: value for name, value in fields.items() if value not in (None, "")})
    if len(images) == 1:
        edit.spec.init_image.CopyFrom(images[0])
    elif not any(violation.field == "image" for violation in violations):
        wrong = Violation("image", Reason.TOO_MANY, _ONE_IMAGE) if images else required("image")
        edit.violations.append(wrong)
    edit.spec.annotations[names.LINK_BASE] = link_base
    return edit


def _of_form(
    parts: list[forms.Part],
) -> tuple[dict[str, Any], list[job_pb2.InitImage], list[Violation]]:
    fields: dict[str, Any] = {}
    images: list[job_pb2.InitImage] = []
    violations: list[Violation] = []
    while parts:
        part = parts.pop(0)  # The bytes of each part are freed once they are in the job.
        if part.name in _IMAGES:
            if image := _image(part):
                images.append(image)
        elif part.name in fields:
            violations.append(protojson.sent_twice(part.name))
        else:
            try:
                is_mask = part.name == "mask" and bool(part.content)
                fields[part.name] = "a file" if is_mask else part.text()
            except ValueError:
                violations.append(invalid_type(part.name, "text in UTF-8"))
    return fields, images, violations


def _image(part: forms.Part) -> job_pb2.InitImage | None:
    """Returns the image of a file, or of a text that is a URL, a data URI or base64."""
    if not part.content:
        return None
    if not part.is_file:
        try:
            return init_image(part.text())
        except ValueError:
            pass
    return job_pb2.InitImage(data=part.content)


def _of_json(
    body: dict[str, Any],
) -> tuple[dict[str, Any], list[job_pb2.InitImage], list[Violation]]:
    images: list[job_pb2.InitImage] = []
    violations: list[Violation] = []
    for name in _IMAGES:
        value = body.pop(name, None)
        for item in value if isinstance(value, list) else [value]:
            text = item
            if isinstance(item, dict):
                text = item.get("image_url")
                if item.get("file_id"):
                    violations.append(Violation("image", Reason.NOT_SUPPORTED, _NO_FILE_ID))
                    continue
            if isinstance(text, str) and _is_unicode(text):
                images += [init_image(text)] if text else []
            elif item is not None:
                expected = "a URL, a data URI or base64, or an object with image_url"
                violations.append(invalid_type("image", expected))
    return body, images, violations


def _fill(edit: Edit, fields: dict[str, Any]) -> None:
    """Sets what the fields say, and lists the wrong ones and those without effect."""
    if "prompt" not in fields:
        edit.violations.append(required("prompt"))
    in_spec: dict[str, Any] = {name: fields.pop(name) for name in EXTRA if name in fields}
    in_spec |= {ours: fields.pop(name) for name, ours in _IN_SPEC.items() if name in fields}
    if "mask" in fields:
        del fields["mask"]
        edit.violations.append(Violation("mask", Reason.NOT_SUPPORTED, _NO_MASK))
    _take_size(edit, fields, in_spec)
    _take_loras(edit, fields, in_spec)
    _take_user(fields, in_spec)
    _take_stream(edit, fields, in_spec)
    _take_formats(edit, fields, in_spec)
    fidelity = _choice(edit, fields, "input_fidelity", _FIDELITIES)
    if fidelity and "strength" in in_spec:
        edit.ignored.append("input_fidelity")
    elif fidelity == "high":
        in_spec["strength"] = HIGH_FIDELITY_STRENGTH
    edit.violations += map(renamed, protojson.fill(edit.spec, in_spec))
    for name, value in fields.items():
        if value not in _FIXED.get(name, ()):
            edit.ignored.append(name)


def _take_size(edit: Edit, fields: dict[str, Any], in_spec: dict[str, Any]) -> None:
    size = fields.pop("size", "auto")
    if size == "auto":
        return
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        in_spec |= {"width": int(match[1]), "height": int(match[2])}
    else:
        message = 'size must be "auto" or WIDTHxHEIGHT, for example "512x768"'
        edit.violations.append(Violation("size", Reason.INVALID_FORMAT, message))


def _take_loras(edit: Edit, fields: dict[str, Any], in_spec: dict[str, Any]) -> None:
    """Reads loras: a text, scales by name or a list as in /v1. The fields loras[NAME] of a form are
    what OpenAI's client for Python makes of scales by name.
    """
    by_name = {
        match[1]: fields.pop(name) for name in [*fields] if (match := _LORA_FIELD.fullmatch(name))
    }
    given = fields.pop("loras", None)
    if by_name and given is not None:
        edit.violations.append(invalid_type("loras", "either a text or scales by name, not both"))
        return
    value = by_name or given
    if isinstance(value, str):
        value = [_lora(text.strip()) for text in value.split(",") if text.strip()]
    elif isinstance(value, dict):
        value = [{"name": name, "scale": scale} for name, scale in value.items()]
    if value is not None:
        in_spec["loras"] = value


def _lora(text: str) -> dict[str, str]:
    """Reads NAME:SCALE or NAME."""
    name, _, scale = text.rpartition(":")
    if name and _NUMBER.fullmatch(scale.strip()):
        return {"name": name.strip(), "scale": scale.strip()}
    return {"name": text}


def _take_user(fields: dict[str, Any], in_spec: dict[str, Any]) -> None:
    for name in ("user", "safety_identifier"):  # The second one takes precedence.
        if name in fields:
            in_spec["track_id"] = fields.pop(name)


def _take_formats(edit: Edit, fields: dict[str, Any], in_spec: dict[str, Any]) -> None:
    edit.links = _choice(edit, fields, "response_format", _LINKS) == "url"
    if edit.stream and edit.links:  # OpenAI's events have no links.
        edit.links = False
        edit.ignored.append("response_format")
    output_format = _choice(edit, fields, "output_format", _FORMATS) or ImageFormat.PNG
    if edit.links and output_format != ImageFormat.PNG:  # Stored files are PNG.
        output_format = ImageFormat.PNG
        edit.ignored.append("output_format")
    in_spec["output_format"] = f"IMAGE_FORMAT_{output_format.upper()}"
    if output_format == ImageFormat.PNG:
        return  # output_compression stays among the fields that have no effect.
    if "output_compression" in fields:
        # OpenAI's scale has the best quality at 100 and begins at 0, ours at 1.
        quality = fields.pop("output_compression")
        in_spec["output_quality"] = 1 if quality in (0, "0") else quality


def _take_stream(edit: Edit, fields: dict[str, Any], in_spec: dict[str, Any]) -> None:
    stream = fields.pop("stream", False)
    known = _BOOLEANS.get(str(stream).lower())
    if known is None:
        edit.violations.append(invalid_type("stream", "true or false"))
    edit.stream = bool(known)
    if "partial_images" not in fields:
        return
    value = fields["partial_images"]
    text = f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)
    if not re.fullmatch("-?[0-9]{1,9}", text, re.ASCII):
        edit.violations.append(invalid_type("partial_images", "an integer"))
    elif not 0 <= int(text) <= MAX_PARTIAL_IMAGES:
        edit.violations.append(out_of_range("partial_images", 0, MAX_PARTIAL_IMAGES))
    elif edit.stream or int(text) == 0:
        edit.partial_images = int(text)
        if edit.partial_images:
            in_spec["preview_interval_steps"] = 1
    else:
        return  # It stays among the fields that have no effect.
    del fields["partial_images"]


def _choice(edit: Edit, fields: dict[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = fields.pop(name, "")
    if value and value not in known:
        edit.violations.append(not_supported(name, known))
        return ""
    return str(value)


def _is_unicode(text: str) -> bool:
    """Returns whether UTF-8 can carry the text: lone surrogates are no Unicode."""
    try:
        text.encode()
    except ValueError:
        return False
    return True
