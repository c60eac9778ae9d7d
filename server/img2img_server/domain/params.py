"""What a caller may ask for: the parameters of a job, their limits and their validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from img2img_server.domain.strength import StrengthRule
from img2img_server.domain.urls import (
    URL_MAX_CHARACTERS,
    NotHttpError,
    UrlError,
    is_web_port,
    parse_url,
)

DEFAULT_STRENGTH = 0.7  # of a model that names none
SEED_MAX = 2**63 - 1
# Seeds that the service draws, and those of the vendor's HTTP contract, are not larger than this.
NARROW_SEED_MAX = 2**32 - 1
RANDOM_SEED = -1
TRACK_ID_MAX_CHARACTERS = 191


class ImageFormat(StrEnum):
    """Format of the inline pictures; the stored file is always PNG."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def media_type(self) -> str:
        return f"image/{self.value}"


class Lane(StrEnum):
    """Queue lane: realtime is served before batch."""

    REALTIME = "realtime"
    BATCH = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every bound a request is held against; GetCapabilities tells these very numbers."""

    max_prompt_characters: int = 2000
    max_negative_prompt_characters: int = 2000
    min_side_pixels: int = 256
    max_side_pixels: int = 1024
    side_multiple: int = 8
    max_samples: int = 4
    max_num_inference_steps: int = 100
    max_guidance_scale: float = 30.0
    max_lora_scale: float = 2.0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParams:
    """One request as understood. None means: the model's own default, see domain/resolve.py.

    `init_image_url` is empty for inline pictures; the picture itself travels beside the parameters.
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
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str = ""
    lora: str = ""
    lora_scale: float = 1.0
    output_format: ImageFormat = ImageFormat.JPEG
    preview_interval_steps: int = 0
    lane: Lane = Lane.REALTIME
    annotations: tuple[tuple[str, str], ...] = ()  # the caller's own notes: name, value

    def sample_seed(self, index: int) -> int:
        """Returns seed + index. A seed below 2^32 starts again at 0 after 2^32 - 1, as in the HTTP
        contract; a larger one after 2^63 - 1."""
        largest = NARROW_SEED_MAX if self.seed <= NARROW_SEED_MAX else SEED_MAX
        return (self.seed + index) % (largest + 1)

    def pixel_steps(self, rule: StrengthRule) -> int:
        """Returns the work of the job: pixels of all samples times the steps that run."""
        steps = rule.denoising_steps(self.strength, self.num_inference_steps or 0)
        return self.samples * self.width * self.height * steps


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule.

    Attributes:
        field: Name of the field in JobSpec.
        description: A sentence that is complete by itself; the HTTP contract fixes its wording.
        cause: What exactly was wrong, as a clause, where the description does not say it.
    """

    field: str
    description: str
    cause: str = ""

    @property
    def text(self) -> str:
        """The description with the cause."""
        return f"{self.description}: {self.cause}" if self.cause else self.description


@dataclass(frozen=True, slots=True)
class ValidationContext:
    """What validation needs to know beside the limits."""

    limits: Limits = field(default_factory=Limits)
    schedulers: tuple[str, ...] = ()
    loras: tuple[str, ...] | None = ()  # None: not known, as the model is not
    is_listed: Callable[[str], bool] = lambda url: False  # any port and http: for webhooks


def validate(params: JobParams, context: ValidationContext) -> list[Violation]:
    """Returns every violated rule, in the order of JobSpec's fields; empty when all is well."""
    return list(_violations(params, context))


def _violations(params: JobParams, context: ValidationContext) -> Iterator[Violation]:
    limits = context.limits
    if not params.prompt:
        yield Violation("prompt", "prompt is required")
    for name in ("prompt", "negative_prompt"):
        most = getattr(limits, f"max_{name}_characters")
        if len(getattr(params, name)) > most:
            yield Violation(name, f"{name} must not be longer than {most} characters")
    for name in ("width", "height"):
        yield from _side(name, getattr(params, name), limits)
    if not 1 <= params.samples <= limits.max_samples:
        yield Violation("samples", f"samples must be between 1 and {limits.max_samples}")
    least, largest = limits.min_strength, limits.max_strength
    if not least <= params.strength <= largest:  # also refuses NaN
        yield Violation("strength", f"strength must be between {least:g} and {largest:g}")
    if not 0 <= params.seed <= limits.max_seed:
        yield Violation("seed", f"seed must be between 0 and {limits.max_seed}")
    if params.webhook:
        yield from _webhook(params.webhook, context)
    if len(params.track_id) > limits.max_track_id_characters:
        most = limits.max_track_id_characters
        yield Violation("track_id", f"track_id must not be longer than {most} characters")
    steps, most_steps = params.num_inference_steps, limits.max_num_inference_steps
    if steps is not None and not 1 <= steps <= most_steps:
        text = f"num_inference_steps must be between 1 and {most_steps}"
        yield Violation("num_inference_steps", text)
    scale = params.guidance_scale
    if scale is not None and not 0.0 <= scale <= limits.max_guidance_scale:
        text = f"guidance_scale must be between 0 and {limits.max_guidance_scale:g}"
        yield Violation("guidance_scale", text)
    if params.scheduler and context.schedulers and params.scheduler not in context.schedulers:
        known = ", ".join(context.schedulers)
        yield Violation("scheduler", f"scheduler must be one of {known}")
    if not 0 <= params.preview_interval_steps <= limits.max_preview_interval_steps:
        most = limits.max_preview_interval_steps
        text = f"preview_interval_steps must be between 0 and {most}"
        yield Violation("preview_interval_steps", text)
    yield from _annotations(params, limits)
    if params.lora and context.loras is not None and params.lora not in context.loras:
        known = ", ".join(context.loras)
        text = f"lora must be one of {known}" if known else "lora: the model offers none"
        yield Violation("lora", text)
    if not 0.0 <= params.lora_scale <= limits.max_lora_scale:
        text = f"lora_scale must be between 0 and {limits.max_lora_scale:g}"
        yield Violation("lora_scale", text)


def _webhook(text: str, context: ValidationContext) -> Iterator[Violation]:
    try:
        url = parse_url(text)
    except NotHttpError:
        yield Violation("webhook", "webhook must be a valid URL")
        return
    except UrlError as error:
        yield Violation("webhook", "webhook must be a valid URL", f"it {error}")
        return
    if context.is_listed(text):
        return
    if url.scheme != "https":
        cause = "it must begin with https://, since the operator does not list its host"
        yield Violation("webhook", "webhook must be a valid URL", cause)
    elif not is_web_port(url.port):
        cause = f"port {url.port} is not a port for HTTP"
        yield Violation("webhook", "webhook must be a valid URL", cause)


def _side(name: str, value: int, limits: Limits) -> Iterator[Violation]:
    low, high = limits.min_side_pixels, limits.max_side_pixels
    if not low <= value <= high:
        yield Violation(name, f"{name} must be between {low} and {high}")
    elif value % limits.side_multiple:
        yield Violation(name, f"{name} must be divisible by {limits.side_multiple}")


def _annotations(params: JobParams, limits: Limits) -> Iterator[Violation]:
    if len(params.annotations) > limits.max_annotations:
        yield Violation(
            "annotations", f"annotations must not have more than {limits.max_annotations} entries"
        )
    longest_name, longest = limits.max_annotation_name_characters, limits.max_annotation_characters
    if not all(1 <= len(name) <= longest_name for name, _ in params.annotations):
        text = f"annotations must have names of 1 to {longest_name} characters"
        yield Violation("annotations", text)
    if any(len(value) > longest for _, value in params.annotations):
        text = f"annotations must not have values longer than {longest} characters"
        yield Violation("annotations", text)
