"""The parameters of a job, their limits and their validation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from img2img_server.domain.prompt_syntax import MAX_REDUCED_WEIGHTS, MAX_WEIGHT, parse
from img2img_server.domain.strength import StrengthMode
from img2img_server.domain.urls import (
    URL_MAX_CHARACTERS,
    NotHttpError,
    UrlError,
    is_web_port,
    parse_url,
)
from img2img_server.domain.violations import (
    Reason,
    Violation,
    invalid_url,
    not_supported,
    out_of_range,
    required,
    too_long,
)

DEFAULT_STRENGTH = 0.7  # default strength of models that define none
SEED_MAX = 2**63 - 1
MAX_SIDE_PIXELS = 4096  # No operator can allow more.
# The largest seed that the service draws, and that the HTTP contract of ModelsLab accepts.
NARROW_SEED_MAX = 2**32 - 1
RANDOM_SEED = -1
MAX_QUALITY = 100  # of JPEG and WebP files
TRACK_ID_MAX_CHARACTERS = 191
# Categories of Unicode whose characters are never visible: spaces, line breaks, control characters
# and formats such as the zero-width space.
_INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
_BLANK = "it has only spaces or other invisible characters"


class ImageFormat(StrEnum):
    """Format of the inline images; the stored file is always PNG."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def media_type(self) -> str:
        return f"image/{self.value}"


class Lane(StrEnum):
    """Priority class: realtime jobs run before batch jobs."""

    REALTIME = "realtime"
    BATCH = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of requests, as GetCapabilities returns them."""

    max_prompt_characters: int = 2000
    max_negative_prompt_characters: int = 2000
    min_side_pixels: int = 256
    max_side_pixels: int = 1024
    side_multiple: int = 8
    max_samples: int = 4
    max_num_inference_steps: int = 100
    max_guidance_scale: float = 30.0
    max_loras: int = 8
    min_lora_scale: float = -2.0
    max_lora_scale: float = 2.0
    max_clip_skip: int = 32  # no CLIP encoder has more layers
    max_preview_interval_steps: int = 100
    max_image_bytes: int = 20_971_520
    max_image_pixels: int = 64_000_000
    max_annotations: int = 16
    max_annotation_name_characters: int = 63
    max_annotation_characters: int = 2000
    max_track_id_characters: int = TRACK_ID_MAX_CHARACTERS
    max_url_characters: int = URL_MAX_CHARACTERS
    max_seed: int = SEED_MAX
    min_strength: float = 0.0
    max_strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA of the model and the scale of its change."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParams:
    """The parameters of one job, complete: domain/resolve.py fills in the defaults of the model.

    Attributes:
        init_image_url: Empty for an inline init image, whose bytes no record has.
        true_cfg_scale: None: off.
        annotations: The caller's own notes, by name.
        output_quality: 0: the quality of imaging/encode.py.
    """

    prompt: str
    negative_prompt: str = ""
    init_image_url: str = ""
    width: int = 512
    height: int = 512
    samples: int = 1
    strength: float = DEFAULT_STRENGTH
    seed: int = 0
    safety_checker: bool = True
    enhance_prompt: bool = False
    base64: bool = False
    temp: bool = False
    webhook: str = ""
    track_id: str = ""
    model: str = ""
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    scheduler: str = ""
    true_cfg_scale: float | None = None
    strength_mode: StrengthMode = StrengthMode.STEPS
    output_format: ImageFormat = ImageFormat.JPEG
    preview_interval_steps: int = 0
    lane: Lane = Lane.REALTIME
    annotations: tuple[tuple[str, str], ...] = ()
    allow_partial: bool = False
    output_quality: int = 0
    prompt_weights: bool = False
    clip_skip: int = 0
    loras: tuple[Lora, ...] = ()

    def sample_seed(self, index: int) -> int:
        """Returns seed + index. A seed below 2^32 starts again at 0 after 2^32 - 1, as in the HTTP
        contract; a larger one after 2^63 - 1."""
        largest = NARROW_SEED_MAX if self.seed <= NARROW_SEED_MAX else SEED_MAX
        return (self.seed + index) % (largest + 1)


@dataclass(frozen=True, slots=True)
class ValidationContext:
    """The limits and choices that a request is validated against."""

    limits: Limits = field(default_factory=Limits)
    schedulers: tuple[str, ...] = ()
    loras: tuple[str, ...] | None = ()  # None: no worker has announced the model
    # whether http and any port are allowed in webhook URLs
    is_listed: Callable[[str], bool] = lambda url: False


def validate(params: JobParams, context: ValidationContext) -> list[Violation]:
    """Returns every broken rule in the order of JobSpec's fields; empty: the request is valid."""
    return list(_violations(params, context))


def _violations(params: JobParams, context: ValidationContext) -> Iterator[Violation]:
    limits = context.limits
    if is_blank(params.prompt):
        yield required("prompt", _BLANK if params.prompt else "")
    for name in ("prompt", "negative_prompt"):
        text, most = getattr(params, name), getattr(limits, f"max_{name}_characters")
        yield from _length(name, text, most)
        if params.prompt_weights and len(text) <= most:
            yield from _weights(name, text)
    for name in ("width", "height"):
        yield from _side(name, getattr(params, name), limits)
    yield from _range("samples", params.samples, 1, limits.max_samples)
    yield from _range("strength", params.strength, limits.min_strength, limits.max_strength)
    yield from _range("seed", params.seed, 0, limits.max_seed)
    if params.webhook:
        yield from _webhook(params.webhook, context)
    yield from _length("track_id", params.track_id, limits.max_track_id_characters)
    steps = params.num_inference_steps
    yield from _range("num_inference_steps", steps, 1, limits.max_num_inference_steps)
    yield from _range("guidance_scale", params.guidance_scale, 0.0, limits.max_guidance_scale)
    if params.scheduler and context.schedulers and params.scheduler not in context.schedulers:
        yield not_supported("scheduler", context.schedulers)
    every, most = params.preview_interval_steps, limits.max_preview_interval_steps
    yield from _range("preview_interval_steps", every, 0, most)
    yield from _annotations(params, limits)
    if params.true_cfg_scale is not None:
        yield from _range("true_cfg_scale", params.true_cfg_scale, 0.0, limits.max_guidance_scale)
    yield from _range("output_quality", params.output_quality, 0, MAX_QUALITY)
    yield from _range("clip_skip", params.clip_skip, 0, limits.max_clip_skip)
    yield from _loras(params.loras, context)


def is_blank(text: str) -> bool:
    """Returns whether the text has no visible character. Such a prompt is refused like an empty
    one.
    """
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def _range(name: str, value: float, least: float, most: float) -> Iterator[Violation]:
    if not least <= value <= most:  # The comparison is false for NaN, too.
        yield out_of_range(name, least, most)


def _length(name: str, text: str, most: int) -> Iterator[Violation]:
    if len(text) > most:
        yield too_long(name, most)


def _weights(name: str, text: str) -> Iterator[Violation]:
    weights = [fragment.weight for section in parse(text) for fragment in section]
    most = f"{MAX_WEIGHT:g}"
    if not all(weight <= MAX_WEIGHT for weight in weights):  # False for NaN, too: 0 times infinity.
        message = f"{name} must not have weights above {most}"
        yield Violation(name, Reason.OUT_OF_RANGE, message, values={"max": most})
    elif not all(weight >= 0 for weight in weights):
        message = f"{name} must not have weights below 0: name what to avoid in negative_prompt"
        yield Violation(name, Reason.OUT_OF_RANGE, message, values={"min": "0", "max": most})
    elif sum(weight < 1 for weight in weights) > MAX_REDUCED_WEIGHTS:
        message = (
            f"{name} must not have more than {MAX_REDUCED_WEIGHTS} parts with a weight below 1"
        )
        yield Violation(
            name, Reason.TOO_MANY, message, values={"max_entries": str(MAX_REDUCED_WEIGHTS)}
        )


def _side(name: str, value: int, limits: Limits) -> Iterator[Violation]:
    divisor = limits.side_multiple
    if not limits.min_side_pixels <= value <= limits.max_side_pixels:
        yield out_of_range(name, limits.min_side_pixels, limits.max_side_pixels)
    elif value % divisor:
        message = f"{name} must be divisible by {divisor}"
        yield Violation(name, Reason.NOT_DIVISIBLE, message, values={"divisor": str(divisor)})


def _webhook(text: str, context: ValidationContext) -> Iterator[Violation]:
    try:
        url = parse_url(text)
    except NotHttpError:
        yield invalid_url("webhook")
        return
    except UrlError as error:
        yield invalid_url("webhook", f"it {error}")
        return
    if context.is_listed(text):
        return
    if url.scheme != "https":
        cause = "it must begin with https://, since the operator does not list its host"
        yield invalid_url("webhook", cause)
    elif not is_web_port(url.port):
        yield invalid_url("webhook", f"port {url.port} is not a port for HTTP")


def _loras(loras: tuple[Lora, ...], context: ValidationContext) -> Iterator[Violation]:
    field, limits, known = "loras", context.limits, context.loras
    if len(loras) > limits.max_loras:
        message = f"loras must not have more than {limits.max_loras} entries"
        values = {"max_entries": str(limits.max_loras)}
        yield Violation(field, Reason.TOO_MANY, message, values=values)
        return  # The other messages would grow with the entries.
    unknown = [lora.name for lora in loras if known is not None and lora.name not in known]
    if unknown:
        if known:
            message = f"loras must be of {', '.join(known)}; there is no {unknown[0]!r}"
            yield Violation(field, Reason.NOT_SUPPORTED, message)
        else:
            message = "loras are not supported: the model has none"
            yield Violation(field, Reason.NOT_SUPPORTED, message)
    names = [lora.name for lora in loras]
    if len(set(names)) < len(names):
        yield Violation(field, Reason.INVALID_FORMAT, "loras must have each name once")
    least, most = limits.min_lora_scale, limits.max_lora_scale
    if not all(least <= lora.scale <= most for lora in loras):  # False for NaN, too.
        message = f"loras must have scales between {least:g} and {most:g}"
        values = {"min_scale": f"{least:g}", "max_scale": f"{most:g}"}
        yield Violation(field, Reason.OUT_OF_RANGE, message, values=values)


def _annotations(params: JobParams, limits: Limits) -> Iterator[Violation]:
    name, most = "annotations", limits.max_annotations
    if len(params.annotations) > most:
        message = f"annotations must not have more than {most} entries"
        yield Violation(name, Reason.TOO_MANY, message, values={"max_entries": str(most)})
    most = limits.max_annotation_name_characters
    if not all(1 <= len(key) <= most for key, _ in params.annotations):
        message = f"annotations must have names of 1 to {most} characters"
        values = {"max_name_characters": str(most)}
        yield Violation(name, Reason.INVALID_FORMAT, message, values=values)
    most = limits.max_annotation_characters
    if any(len(value) > most for _, value in params.annotations):
        message = f"annotations must not have values longer than {most} characters"
        yield Violation(name, Reason.TOO_LONG, message, values={"max_characters": str(most)})
