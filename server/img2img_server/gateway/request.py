"""From the values of a body to the JobSpec that the api gets."""

from __future__ import annotations

import binascii
from collections.abc import Collection, Mapping
from typing import Any

from google.protobuf.message import Message

from img2img.v1 import job_pb2
from img2img_server.contract import notes
from img2img_server.gateway.contract import DEFAULT_STRENGTH, FIELDS, HINTS, LIMITS

_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\f\v"
# What is not base64 becomes bytes that are no picture: the contract checks the picture after the
# key, the other fields and the queue, and all of these are the api's to check.
_NO_PICTURE = b"\x00"


def job_spec(values: Mapping[str, Any], link_base: str) -> job_pb2.JobSpec:
    """The request for the api, made of values that broke no rule."""
    sent = {
        entry.name: values[entry.name] for entry in FIELDS if entry.in_spec and entry.name in values
    }
    annotations = {notes.LINK_BASE: link_base}
    if values.get("instant_response"):
        annotations[notes.INSTANT_RESPONSE] = "yes"
    if "enhance_style" in values:
        annotations[notes.ENHANCE_STYLE] = values["enhance_style"][
            : LIMITS.max_annotation_characters
        ]
    if isinstance(sent.get("track_id"), int):
        sent["track_id"] = str(sent["track_id"])
        annotations[notes.TRACK_ID_TYPE] = "integer"
    sent.setdefault("strength", DEFAULT_STRENGTH)  # the contract's, whatever the model's own is
    sent["init_image"] = init_image(sent["init_image"])
    return job_pb2.JobSpec(**sent, annotations=annotations)


def drop_hints(spec: Message, names: Collection[str]) -> bool:
    """Takes those of the names that are hints out of a JobSpec; whether it had any of them."""
    had = [name for name in HINTS.intersection(names) if spec.HasField(name)]
    for name in had:
        spec.ClearField(name)
    return bool(had)


def init_image(text: str) -> job_pb2.InitImage:
    """A URL, a data URI with ";base64,", or base64: either alphabet, padded or not (section 5)."""
    text = text.strip()
    if text[:8].lower().startswith(("http://", "https://")):
        return job_pb2.InitImage(url=text)
    if text[:5].lower() == "data:" and ";base64," in text[:256]:
        text = text.partition(";base64,")[2]
    return job_pb2.InitImage(data=_decoded(text) or _NO_PICTURE)


def _decoded(text: str) -> bytes:
    try:
        data = text.encode("ascii").translate(_URL_SAFE_TO_STANDARD, _WHITE_SPACE).rstrip(b"=")
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except ValueError:
        return b""
