"""The request bodies of ModelsLab's contract: their fields, and how JSON values are read.

Clients of ModelsLab send numbers and booleans as strings, so pydantic's lax mode reads both
spellings; see docs/http-contract.md#coercion. Limits appear here in the JSON Schemas only;
domain/params.py checks them.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from google.protobuf.message import Message
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import names
from img2img_server.compat.modelslab.server_types import WITHOUT_EFFECT
from img2img_server.domain.data_uris import decode_base64, decode_data_uri, is_data_uri
from img2img_server.domain.params import (
    NARROW_SEED_MAX,
    RANDOM_SEED,
    JobParams,
    Limits,
    ValidationContext,
    validate,
)
from img2img_server.domain.storage import MAX_CHARACTERS, REALTIME
from img2img_server.domain.violations import Violation, invalid_type, required

LIMITS = Limits(max_seed=NARROW_SEED_MAX)
_CONTEXT = ValidationContext(LIMITS)
# Hints outside of these limits are clamped; hints that cannot be read are ignored.
HINTS: dict[str, tuple[str, float, float]] = {
    "guidance_scale": ("a number", 0, LIMITS.max_guidance_scale),
    "num_inference_steps": ("an integer", 1, LIMITS.max_num_inference_steps),
}
_MAX_NAMED_FIELDS = 20  # most unknown fields that a warning names
_MAX_NAME_CHARACTERS = 40
_MAX_SAMPLE_CHARACTERS = 1024  # characters; enough for the api to recognise the kind of a file
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_EXPECTED: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str | int: "a string or an integer",
}
_DIGITS = Annotated[str, Field(pattern=r"^\s*[+-]?[0-9]{1,400}\s*$")]
_DECIMAL = Annotated[str, Field(pattern=r"^\s*[+-]?[0-9]{1,400}(\.[0-9]{1,400})?\s*$")]
_ABSENT = Literal[""] | None
_DEFAULTS = JobParams(prompt="")
_UNSET: Any = None  # the default of fields whose value the service chooses


def _number(value: Any) -> Any:
    """Rejects values that pydantic reads as numbers and the contract does not: true and "1_000"."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError
    return value


def _reference(value: Any) -> Any:
    return value if isinstance(value, str) else _number(value)


def _boolean(value: Any) -> bool | None:
    return _BOOLEANS.get(str(value).strip().lower())


def _unicode(value: Any) -> Any:
    """Rejects lone surrogates, which neither gRPC nor UTF-8 can carry."""
    if isinstance(value, str) and not value.isascii():
        value.encode()
    return value


def _hint(value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo[list[str]]) -> Any:
    """Clamps a hint or ignores it, and appends a warning to the context of the validation."""
    name = str(info.field_name)
    expected, least, most = HINTS[name]
    try:
        number = read(_number(value))
    except ValueError:
        info.context.append(ignored(name, f"it must be {expected}"))
        return None
    if least <= number <= most:
        return number
    limit, which = (least, "smallest") if number < least else (most, "largest")
    info.context.append(f"{name} was set to {limit:g}, the {which} value allowed.")
    return type(number)(limit)


def _style(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(_unicode(value))
    except ValueError:
        return None


def _reads(read: Any, spelling: Any, *others: Any, **limits: Any) -> BeforeValidator:
    """Returns a validator with JSON Schemas of the accepted spellings. The first schema gets the
    limits.
    """
    schema: Any = Annotated[spelling, Field(**limits)]
    for other in others:
        schema |= other
    return BeforeValidator(read, json_schema_input_type=schema)


def _text(**limits: Any) -> BeforeValidator:
    return _reads(_unicode, str, **limits)


def _optional_text(**limits: Any) -> BeforeValidator:
    return _reads(_unicode, str, _ABSENT, **limits)


def _integer(**limits: Any) -> BeforeValidator:
    return _reads(_number, int, _DIGITS, _ABSENT, **limits)


_WORDS = Literal["true", "false", "yes", "no", "1", "0"]
_SIDES = {"ge": LIMITS.min_side_pixels, "le": LIMITS.max_side_pixels}
_STRENGTHS = {"ge": LIMITS.min_strength, "le": LIMITS.max_strength}
_URLS = {"pattern": "^https?://"}
Finite = Field(allow_inf_nan=False)
Hint = WrapValidator(_hint, json_schema_input_type=Any)
Style = WrapValidator(_style, json_schema_input_type=Any)
Boolean = Annotated[bool, Strict(), _reads(_boolean, bool, Literal[0, 1], _WORDS, _ABSENT)]
Side = Annotated[int, _integer(**_SIDES, multiple_of=LIMITS.side_multiple)]
Strength = Annotated[float, Finite, _reads(_number, float, _DECIMAL, _ABSENT, **_STRENGTHS)]
Detail = Annotated[str, _text(min_length=1, max_length=MAX_CHARACTERS)]
Address = Annotated[str, _text(min_length=1, max_length=MAX_CHARACTERS, **_URLS)]
TrackId = _reads(_reference, str, int, _ABSENT, max_length=LIMITS.max_track_id_characters)
ServerTypes = Literal[(REALTIME, *sorted(WITHOUT_EFFECT))]  # type: ignore[valid-type]


class KeyRequest(BaseModel, use_attribute_docstrings=True):
    """The body of a call that has no other field than the key."""

    key: str = ""
    """API key. It may be in a header instead."""


class FetchRequest(KeyRequest):
    """The body of a fetch without an id in its path."""

    request_id: int | _DIGITS


class Img2ImgRequest(KeyRequest):
    """The body of img2img. Null and "" equal an absent field, and unknown fields are ignored."""

    prompt: Annotated[str, _text(min_length=1, max_length=LIMITS.max_prompt_characters)]
    """The content of the image: at least one visible character."""
    negative_prompt: Annotated[
        str, _optional_text(max_length=LIMITS.max_negative_prompt_characters)
    ] = _DEFAULTS.negative_prompt
    """Content that the image must not have."""
    init_image: Annotated[str, _text(min_length=1)]
    """The init image: a URL, a data URI or base64 of a PNG, JPG or WebP file of at most
    20 MB and 64 megapixels."""
    width: Side = _DEFAULTS.width
    """Width of the result in pixels."""
    height: Side = _DEFAULTS.height
    """Height of the result in pixels."""
    samples: Annotated[int, _integer(ge=1, le=LIMITS.max_samples)] = _DEFAULTS.samples
    """Number of images; image i uses seed (seed + i) mod 2^32."""
    strength: Strength = _UNSET
    """How strongly the image is changed: 0 returns the prepared init image, 1 keeps nothing of it.
    Default: the model's own, else 0.7."""
    seed: Annotated[int, _integer(ge=RANDOM_SEED, le=LIMITS.max_seed)] = _UNSET
    """Seed of the random noise. Absent, null and -1 stand for a random one for the job."""
    safety_checker: Boolean = _DEFAULTS.safety_checker
    """Check the results, and blank images that are not safe for work."""
    base64: Boolean = _DEFAULTS.base64
    """Links to base64 text files instead of images."""
    instant_response: Boolean = False
    """Respond with `processing` at once instead of waiting for the job."""
    enhance_prompt: Boolean = _DEFAULTS.enhance_prompt
    """Let the service rewrite the prompt; `meta.prompt` is the text that was used."""
    temp: Boolean = _DEFAULTS.temp
    """Keep the files under /temp/ for 24 hours."""
    webhook: Annotated[str, _optional_text(max_length=LIMITS.max_url_characters, **_URLS)] = _UNSET
    """https URL that gets one POST when the job has ended. The response then comes at once."""
    track_id: Annotated[str | int, TrackId] = _UNSET
    """The caller's own reference, returned unchanged."""
    guidance_scale: Annotated[float, Finite, Hint] = _UNSET
    """A hint: clamped to the limits or ignored, with a `warning`. The default and the limits are
    the model's own, see /v1/capabilities."""
    num_inference_steps: Annotated[int, Hint] = _UNSET
    """A hint, like guidance_scale."""
    enhance_style: Annotated[str, Style] = _UNSET
    """Ignored, with a `warning`, and returned in `meta`."""


class ResetS3Request(KeyRequest):
    """The body of reset_s3."""

    deploy_type: Annotated[str, _reads(_unicode, ServerTypes, _ABSENT)] = REALTIME
    """Only `realtime` has an effect."""


class UpdateS3Request(ResetS3Request):
    """The body of update_s3. Null and "" equal an absent field."""

    public_url: Address
    region_name: Detail
    endpoint_url: Address
    aws_access_key_id: Detail
    aws_secret_access_key: Detail
    image_directory: Detail
    bucket: Annotated[str, _optional_text(max_length=MAX_CHARACTERS)] = ""
    check_connection: Boolean = False
    """Store and read a small file first, and report what fails."""


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """A body, parsed by its pydantic model.

    Attributes:
        values: The fields that are present and valid.
        violations: Every broken rule, in the order of the model's fields.
        warnings: A sentence for everything that was ignored or changed.
    """

    values: dict[str, Any]
    violations: list[Violation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse(model: type[BaseModel], body: Mapping[str, Any]) -> ParsedBody:
    """Reads all fields except `key`."""
    fields = {name: info for name, info in model.model_fields.items() if name != "key"}
    given = {name: body[name] for name in fields if body.get(name) not in (None, "")}
    missing = {name: "" for name, info in fields.items() if info.is_required()}
    wrong: set[str] = set()
    warnings: list[str] = []
    try:
        parsed = model.model_validate(missing | given, context=warnings)
    except ValidationError as error:
        wrong = {str(each["loc"][0]) for each in error.errors(include_input=False)}
        given = {name: value for name, value in given.items() if name not in wrong}
        parsed = model.model_validate(missing | given, context=warnings)
    violations = [
        invalid_type(name, _EXPECTED[info.annotation]) if name in wrong else required(name)
        for name, info in fields.items()
        if name in wrong or (name in missing and name not in given)
    ]
    values = {name: getattr(parsed, name) for name in given}
    values = {name: value for name, value in values.items() if value is not None}
    return ParsedBody(values, violations, warnings)


def merge(
    model: type[BaseModel], violations: Iterable[Violation], others: Iterable[Violation] = ()
) -> list[Violation]:
    """Returns all violations in the order of the model's fields. Of `others`, only those of further
    fields are added.
    """
    reported = {violation.field for violation in violations}
    merged = [*violations, *(other for other in others if other.field not in reported)]
    order = {name: place for place, name in enumerate(model.model_fields)}
    return sorted(merged, key=lambda violation: order.get(violation.field, len(order)))


def read(body: Mapping[str, Any], context: ValidationContext = _CONTEXT) -> ParsedBody:
    """Reads the body of img2img."""
    parsed = parse(Img2ImgRequest, body)
    if parsed.values.get("seed") == RANDOM_SEED:
        del parsed.values["seed"]
    params = {n: v for n, v in _in_spec(parsed.values).items() if n != "init_image"}
    broken = validate(JobParams(**{"prompt": "", **params}), context)
    violations = merge(Img2ImgRequest, parsed.violations, broken)
    return ParsedBody(parsed.values, violations, _unknown(body) + parsed.warnings)


def ignored(name: str, why: str) -> str:
    """Returns the warning about a hint that was ignored."""
    return f"{name} was ignored: {why}."


def _unknown(body: Mapping[str, Any]) -> list[str]:
    """Returns a warning that names the fields of the body that have no effect, if there are any."""
    known = Img2ImgRequest.model_fields.keys() - {"enhance_style"}
    return without_effect(
        [name for name, value in body.items() if name not in known and value not in (None, "")]
    )


def without_effect(names: Sequence[str]) -> list[str]:
    """Returns a warning that names the fields that have no effect, if there are any."""
    if not names:
        return []
    shown = [_shown(name) for name in names[:_MAX_NAMED_FIELDS]]
    if more := len(names) - len(shown):
        shown.append(f"{more} more")
    if len(names) == 1:
        return [f"The field {shown[0]} has no effect here and was ignored."]
    return [
        f"The fields {', '.join(shown[:-1])} and {shown[-1]} have no effect here and were ignored."
    ]


def _shown(name: str) -> str:
    text = name if name.isidentifier() else repr(name)
    return text if len(text) <= _MAX_NAME_CHARACTERS else text[:_MAX_NAME_CHARACTERS] + "…"


def _in_spec(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the fields that JobSpec also has."""
    names = job_pb2.JobSpec.DESCRIPTOR.fields_by_name
    texts = {"track_id": str(values["track_id"])} if "track_id" in values else {}
    return {name: value for name, value in values.items() if name in names} | texts


def job_spec(values: Mapping[str, Any], link_base: str) -> job_pb2.JobSpec:
    """Returns the api's request for values that broke no rule."""
    annotations = {names.LINK_BASE: link_base}
    if values.get("instant_response"):
        annotations[names.INSTANT_RESPONSE] = "yes"
    if style := values.get("enhance_style"):
        annotations[names.ENHANCE_STYLE] = style[: LIMITS.max_annotation_characters]
    if isinstance(values.get("track_id"), int):
        annotations[names.TRACK_ID_TYPE] = "integer"
    # The contract has its own default size. Over gRPC the model's native size is the default.
    sides = {"width": _DEFAULTS.width, "height": _DEFAULTS.height}
    fields = sides | _in_spec(values) | {"init_image": init_image(values["init_image"])}
    return job_pb2.JobSpec(**fields, annotations=annotations)


def drop_hints(spec: Message, names: Collection[str]) -> list[str]:
    """Removes hints from a JobSpec. Returns the removed ones."""
    dropped = [name for name in names if name in HINTS and spec.HasField(name)]
    for name in dropped:
        spec.ClearField(name)
    return dropped


def init_image(text: str) -> job_pb2.InitImage:
    """Reads a URL, a data URI, or base64 in either alphabet; see docs/http-contract.md#init-image.

    Any other text goes to the api unchanged, whose error describes it.
    """
    text = text.strip(string.whitespace)  # A no-break space is a part of a URL.
    if text[:8].lower().startswith(("http://", "https://")):
        return job_pb2.InitImage(url=text)
    try:
        data = decode_data_uri(text) if is_data_uri(text) else decode_base64(text)
    except ValueError:
        data = b""
    if data:
        return job_pb2.InitImage(data=data)
    if is_data_uri(text):
        return job_pb2.InitImage(url=text)
    return job_pb2.InitImage(data=text[:_MAX_SAMPLE_CHARACTERS].encode(errors="replace"))
