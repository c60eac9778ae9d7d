"""From the values of a body to the JobSpec that the api gets."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping
from typing import Any

from google.protobuf.message import Message

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import annotation_keys
from img2img_server.domain.data_uris import (
    NO_IMAGE,
    decode_base64,
    decode_data_uri,
    is_data_uri,
)
from img2img_server.gateway.modelslab.fields import FIELDS, HINTS, LIMITS


def job_spec(values: Mapping[str, Any], link_base: str) -> job_pb2.JobSpec:
    """The request for the api, made of values that broke no rule."""
    sent = {
        entry.name: values[entry.name] for entry in FIELDS if entry.in_spec and entry.name in values
    }
    annotations = {annotation_keys.LINK_BASE: link_base}
    if values.get("instant_response"):
        annotations[annotation_keys.INSTANT_RESPONSE] = "yes"
    if "enhance_style" in values:
        annotations[annotation_keys.ENHANCE_STYLE] = values["enhance_style"][
            : LIMITS.max_annotation_characters
        ]
    if isinstance(sent.get("track_id"), int):
        sent["track_id"] = str(sent["track_id"])
        annotations[annotation_keys.TRACK_ID_TYPE] = "integer"
    sent["init_image"] = init_image(sent["init_image"])
    return job_pb2.JobSpec(**sent, annotations=annotations)


def drop_hints(spec: Message, names: Collection[str]) -> list[str]:
    """Takes those of the names that are hints out of a JobSpec; returns the ones that it had."""
    had = [name for name in names if name in HINTS and spec.HasField(name)]
    for name in had:
        spec.ClearField(name)
    return had


def init_image(text: str) -> job_pb2.InitImage:
    """A URL, a data URI, or base64: either alphabet, padded or not (section 5)."""
    text = text.strip(string.whitespace)  # a no-break space belongs to a URL
    if text[:8].lower().startswith(("http://", "https://")):
        return job_pb2.InitImage(url=text)
    try:
        data = decode_data_uri(text) if is_data_uri(text) else decode_base64(text)
    except ValueError:  # the api says what it is instead of an image
        data = text[:1024].encode(errors="replace")
    return job_pb2.InitImage(data=data or NO_IMAGE)
