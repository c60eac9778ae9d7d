"""What the service answers with, as plain frozen dataclasses.

Fields are called what img2img/v1/job.proto calls them; durations are seconds and say so in their
name. None means that the service did not set the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from img2img_client.errors import InvalidArgumentError, Violation

SUFFIX_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class State(StrEnum):
    """Where a job is in its life. UNSPECIFIED: a state that this client does not know."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class ImageFormat(StrEnum):
    """Format of the inline pictures; the file behind a link is always PNG."""

    UNSPECIFIED = "unspecified"
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class Lane(StrEnum):
    """Queue lane: realtime is served before batch."""

    UNSPECIFIED = "unspecified"
    REALTIME = "realtime"
    BATCH = "batch"


class DeterminismClass(StrEnum):
    """How a picture compares with the one the same request gives again."""

    UNSPECIFIED = "unspecified"
    EXACT = "exact"
    BOUNDED = "bounded"
    CLOSE = "close"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An encoded picture. `sha256`: of `data`, 64 hexadecimal digits. Sides in pixels."""

    data: bytes = field(repr=False)
    media_type: str
    size_bytes: int
    sha256: str
    width: int
    height: int

    def save(self, path: str | Path) -> Path:
        """Writes the file and returns its path.

        Raises:
            InvalidArgumentError: the suffix names another format than the picture has, or the
                picture's bytes are not here (a job that ended too long ago: fetch its link
                instead).
            OSError: the file cannot be written.
        """
        path = Path(path)
        if not self.data:
            text = "the picture came without its bytes; download its link instead"
            raise InvalidArgumentError(Violation("data", text))
        wanted = SUFFIX_FORMATS.get(path.suffix.lower())
        if wanted is not None and self.media_type != f"image/{wanted}":
            text = f"{path.name} would hold {self.media_type}; ask for output_format={wanted!r}"
            raise InvalidArgumentError(Violation("path", text))
        path.write_bytes(self.data)
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage(Image):
    """One picture of a finished job. `url`: its PNG in the store."""

    index: int
    seed: int
    nsfw: bool = False
    url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture of a job as its record has it; `url` and `sha256` are empty until stored."""

    index: int
    seed: int
    url: str
    sha256: str
    size_bytes: int
    nsfw: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of an ended job went. `steps` are summed over the samples, `batch_share` is
    the mean share of the device batch, 0 to 1."""

    queue_seconds: float
    fetch_seconds: float
    prepare_seconds: float
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    safety_seconds: float
    image_encode_seconds: float
    upload_seconds: float
    engine_seconds: float
    total_seconds: float
    steps: int
    batch_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why a job failed. Branch on `reason`; `retryable`: the same request may work later."""

    reason: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The request as the service understood it: defaults filled in, seed drawn."""

    prompt: str
    negative_prompt: str
    init_image_url: str
    width: int
    height: int
    samples: int
    strength: float
    seed: int
    safety_checker: bool
    enhance_prompt: bool
    base64: bool
    temp: bool
    webhook: str
    track_id: str
    model: str
    num_inference_steps: int | None
    guidance_scale: float | None
    scheduler: str
    output_format: ImageFormat
    preview_interval_steps: int
    lane: Lane
    annotations: Mapping[str, str]
    lora: str
    lora_scale: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request and its life. `name` is "jobs/{id}"; `future_urls` are known before the files."""

    name: str
    id: int
    state: State
    spec: Spec
    samples: tuple[Sample, ...]
    future_urls: tuple[str, ...]
    error: JobError | None
    timings: Timings | None
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    expire_time: datetime | None
    worker: str
    device: str
    determinism: DeterminismClass
    attempt: int
    file_prefix: str
    warning: str
    eta_seconds: float | None
    original_prompt: str
    webhook_status: str
    webhook_error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model being served; the default scheduler is the first. The limits are those of requests
    for this model; 0: the service is too old to tell them."""

    name: str
    family: str
    schedulers: tuple[str, ...]
    default_num_inference_steps: int
    default_guidance_scale: float
    default_strength: float
    workers: int
    device: str
    native_size: int
    loras: tuple[str, ...]
    max_num_inference_steps: int
    min_side_pixels: int
    max_side_pixels: int
    side_multiple: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits that a request is held against; a model may have narrower ones. 0: the service is
    too old to tell them."""

    max_prompt_characters: int
    min_side_pixels: int
    max_side_pixels: int
    side_multiple: int
    max_samples: int
    max_num_inference_steps: int
    max_guidance_scale: float
    max_image_bytes: int
    max_image_pixels: int
    max_message_bytes: int
    max_queued_jobs: int
    retention_seconds: float | None
    init_image_media_types: tuple[str, ...]
    max_negative_prompt_characters: int
    max_lora_scale: float
    max_preview_interval_steps: int
    max_annotations: int
    max_annotation_name_characters: int
    max_annotation_characters: int
    max_track_id_characters: int
    max_url_characters: int
    max_seed: int
    min_strength: float
    max_strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What the service can do now; the default model is the first."""

    server_version: str
    models: tuple[Model, ...]
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Tenant and permissions of an API key. `key_id` is the id of the key in the server's log."""

    tenant: str
    key_id: str
    permissions: tuple[str, ...]
