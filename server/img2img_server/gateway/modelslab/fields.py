"""The body of img2img: one table of fields, from which everything else about them follows.

Reading and messages, the JobSpec that the api gets (request.py) and the OpenAPI document all come
from FIELDS; the limits are those of the domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from img2img_server.domain.params import (
    NARROW_SEED_MAX,
    RANDOM_SEED,
    TRACK_ID_MAX_CHARACTERS,
    JobParams,
    Limits,
    ValidationContext,
    validate,
)
from img2img_server.domain.urls import URL_MAX_CHARACTERS
from img2img_server.domain.violations import Violation, invalid_type, required
from img2img_server.gateway.modelslab.field_types import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    REFERENCE,
    STRING,
    Kind,
)

LIMITS = Limits(max_seed=NARROW_SEED_MAX)
_CONTEXT = ValidationContext(LIMITS)


@dataclass(frozen=True, slots=True)
class Field:
    """One field of the body.

    `schema`: its limits in JSON Schema. `hint`: what cannot be read is ignored and what is out of
    bounds is clamped, never an error. `in_spec`: JobSpec has it under the same name.
    """

    name: str
    kind: Kind
    docs: str
    default: Any = None
    schema: Mapping[str, Any] = field(default_factory=dict)
    required: bool = False
    hint: bool = False
    in_spec: bool = True


_PROMPT = {"maxLength": LIMITS.max_prompt_characters}
_SIDE = {
    "minimum": LIMITS.min_side_pixels,
    "maximum": LIMITS.max_side_pixels,
    "multipleOf": LIMITS.side_multiple,
}
_SAMPLES = {"minimum": 1, "maximum": LIMITS.max_samples}
_GUIDANCE = {"minimum": 0, "maximum": LIMITS.max_guidance_scale}
_STEPS = {"minimum": 1, "maximum": LIMITS.max_num_inference_steps}
_HINT = (
    "A hint: brought within the limits, or ignored; `warning` says so. Default and limit: the "
    "model's own, see /v1/capabilities."
)
_NAMED = 20  # ignored fields that a warning names
_NAME_SHOWN_CHARACTERS = 40

FIELDS = (
    Field("prompt", STRING, "What the picture shall show.", schema=_PROMPT, required=True),
    Field("negative_prompt", STRING, "What it shall not show.", "", _PROMPT),
    Field(
        "init_image",
        STRING,
        "The picture to start from: a URL, a data URI or base64 of a PNG, JPG or WebP file of at "
        "most 20 MB and 64 megapixels.",
        required=True,
    ),
    Field("width", INTEGER, "Width of the result in pixels.", 512, _SIDE),
    Field("height", INTEGER, "Height of the result in pixels.", 512, _SIDE),
    Field(
        "samples",
        INTEGER,
        "Number of images; image i uses seed (seed + i) mod 2^32.",
        1,
        _SAMPLES,
    ),
    Field(
        "strength",
        NUMBER,
        "How strongly the image is changed: 0 returns the prepared init image, 1 keeps nothing of "
        "it. Default: the model's own, else 0.7.",
        None,
        {"minimum": LIMITS.min_strength, "maximum": LIMITS.max_strength},
    ),
    Field(
        "seed",
        INTEGER,
        "Start of the random numbers; absent, null or -1: drawn at random once for the job.",
        None,
        {"minimum": RANDOM_SEED, "maximum": NARROW_SEED_MAX},
    ),
    Field("safety_checker", BOOLEAN, "Check the results, blank what is not safe for work.", True),
    Field("base64", BOOLEAN, "Links to base64 text files instead of images.", False),
    Field(
        "instant_response",
        BOOLEAN,
        "Answer `processing` at once instead of waiting for the job.",
        False,
        in_spec=False,
    ),
    Field(
        "enhance_prompt",
        BOOLEAN,
        "Let the service improve the prompt; `meta.prompt` is the text really used.",
        False,
    ),
    Field("temp", BOOLEAN, "Keep the files under /temp/ for 24 hours.", False),
    Field(
        "webhook",
        STRING,
        "https address that gets one POST when the job has ended; the answer comes at once.",
        schema={"maxLength": URL_MAX_CHARACTERS, "pattern": "^https?://"},
    ),
    Field(
        "track_id",
        REFERENCE,
        "The caller's own reference, given back unchanged.",
        schema={"maxLength": TRACK_ID_MAX_CHARACTERS},
    ),
    Field("guidance_scale", NUMBER, _HINT, schema=_GUIDANCE, hint=True),
    Field("num_inference_steps", INTEGER, _HINT, schema=_STEPS, hint=True),
    Field(
        "enhance_style",
        STRING,
        "Ignored, given back in `meta`; `warning` says so.",
        hint=True,
        in_spec=False,
    ),
)
HINTS = frozenset(entry.name for entry in FIELDS if entry.hint and entry.in_spec)
_ORDER = {entry.name: place for place, entry in enumerate(FIELDS)}
_READ = frozenset(_ORDER) - {"enhance_style"} | {"key"}


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """A body as understood: coerced values without the absent ones, every broken rule, and a
    sentence for everything that was ignored or changed."""

    values: dict[str, Any]
    violations: list[Violation]
    warnings: list[str] = field(default_factory=list)


def read(body: Mapping[str, Any], context: ValidationContext = _CONTEXT) -> ParsedBody:
    """Reads the body of img2img; never raises. Violations come in table order."""
    values: dict[str, Any] = {}
    violations = []
    warnings = _unknown(body)
    for entry in FIELDS:
        value = body.get(entry.name)
        if value is None or value == "":
            if entry.required:
                violations.append(required(entry.name))
            continue
        try:
            read_value = entry.kind.read(value)
        except ValueError:
            if entry.hint and entry.in_spec:
                warnings.append(ignored(entry.name, f"it must be {entry.kind.expected}"))
            elif not entry.hint:
                violations.append(invalid_type(entry.name, entry.kind.expected))
            continue
        values[entry.name] = within = _clamped(entry, read_value)
        if within != read_value:
            limit = f"the {'largest' if within < read_value else 'smallest'} value allowed"
            warnings.append(f"{entry.name} was set to {within:g}, {limit}.")
    if values.get("seed") == RANDOM_SEED:
        del values["seed"]
    refused = {violation.field for violation in violations}
    beyond = [broken for broken in _beyond_limits(values, context) if broken.field not in refused]
    return ParsedBody(values, in_table_order(violations + beyond), warnings)


def ignored(name: str, why: str) -> str:
    """Returns the warning about a hint that was ignored."""
    return f"{name} was ignored: {why}."


def _unknown(body: Mapping[str, Any]) -> list[str]:
    """A warning that names the fields of the body that have no effect here, if there are any."""
    names = [name for name, value in body.items() if name not in _READ and value not in (None, "")]
    if not names:
        return []
    shown = [_shown(name) for name in names[:_NAMED]]
    if more := len(names) - len(shown):
        shown.append(f"{more} more")
    if len(names) == 1:
        return [f"The field {shown[0]} has no effect here and was ignored."]
    return [
        f"The fields {', '.join(shown[:-1])} and {shown[-1]} have no effect here and were ignored."
    ]


def _shown(name: str) -> str:
    """A field's name as far as a sentence has room for it."""
    text = name if name.isidentifier() else repr(name)
    if len(text) > _NAME_SHOWN_CHARACTERS:
        text = text[:_NAME_SHOWN_CHARACTERS] + "…"
    return text


def in_table_order(violations: list[Violation]) -> list[Violation]:
    """Sorts by the table; fields that it lacks come last."""
    return sorted(violations, key=lambda violation: _ORDER.get(violation.field, len(_ORDER)))


def _clamped(entry: Field, value: Any) -> Any:
    if entry.hint and "minimum" in entry.schema:
        return min(max(value, entry.schema["minimum"]), entry.schema["maximum"])
    return value


def _beyond_limits(values: Mapping[str, Any], context: ValidationContext) -> list[Violation]:
    known = {
        entry.name: values[entry.name]
        for entry in FIELDS
        if entry.in_spec and entry.name in values and entry.name != "init_image"
    }
    if "track_id" in known:
        known["track_id"] = str(known["track_id"])
    return validate(JobParams(**{"prompt": "", **known}), context)
