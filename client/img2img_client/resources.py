"""The service's resources as frozen dataclasses.

Fields have the names of img2img/v1/job.proto. Durations are in seconds and end in `_seconds`. None
means that the service did not set the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from img2img.v1 import event_pb2
from img2img_client.errors import JobCancelledError, JobEndError, JobFailedError, invalid
from img2img_client.spec import Spec

# The kinds of event that carry a job's record: the snapshot, and one for each terminal state.
RECORD_EVENTS = frozenset(
    kind.name
    for kind in event_pb2.JobEvent.DESCRIPTOR.oneofs_by_name["event"].fields
    if kind.message_type and "job" in kind.message_type.fields_by_name
)
SUFFIX_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class State(StrEnum):
    """State of a job. UNSPECIFIED: a state that this client does not know."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended: the terminal event has the name of the state."""
        return self.value in RECORD_EVENTS


class DeterminismClass(StrEnum):
    """How closely an image matches the one that the same request generates again."""

    UNSPECIFIED = "unspecified"
    EXACT = "exact"
    BOUNDED = "bounded"
    CLOSE = "close"


class ModelKind(StrEnum):
    """The value that a model predicts: the noise of a variance schedule, or the velocity of
    flow matching. UNSPECIFIED: unknown to this client or to the worker."""

    UNSPECIFIED = "unspecified"
    DIFFUSION = "diffusion"
    FLOW = "flow"


class ModelState(StrEnum):
    """Whether a model takes requests at once, or after a worker has loaded it. UNSERVED: its jobs
    wait until a worker serves it. UNSPECIFIED: the service is too old to report the state."""

    UNSPECIFIED = "unspecified"
    LOADED = "loaded"
    COLD = "cold"
    UNSERVED = "unserved"


class Guidance(StrEnum):
    """The effect of guidance_scale: a second forward a step above 1 or above 0, an input of the
    model, or none. UNSPECIFIED: unknown to this client or to the worker."""

    UNSPECIFIED = "unspecified"
    CLASSIFIER_FREE = "classifier_free"
    CLASSIFIER_FREE_FROM_ZERO = "classifier_free_from_zero"
    EMBEDDED = "embedded"
    NONE = "none"


class StrengthRule(StrEnum):
    """How strength x num_inference_steps is rounded to the number of steps that run; ALL: every
    step runs. UNSPECIFIED: unknown to this client or to the worker.
    """

    UNSPECIFIED = "unspecified"
    FLOOR = "floor"
    CEIL = "ceil"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An encoded image. `sha256`: of `data`, 64 hexadecimal digits. Sides in pixels."""

    data: bytes = field(repr=False)
    media_type: str
    size_bytes: int
    sha256: str
    width: int
    height: int

    def save(self, path: str | Path) -> Path:
        """Writes the file and returns its path.

        Raises:
            InvalidArgumentError: the suffix names another format than the image has, or `data` is
                empty because the job's events have expired; download the image's link instead.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if not self.data:
            text = "data is empty because the job's events have expired: download the link instead"
            raise invalid("data", "REQUIRED", text)
        wanted = SUFFIX_FORMATS.get(path.suffix.lower())
        if wanted is not None and self.media_type != f"image/{wanted}":
            text = f"{path.name} cannot hold {self.media_type}: request output_format={wanted!r}"
            raise invalid("path", "INVALID_FORMAT", text)
        path.write_bytes(self.data)
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage(Image):
    """One image of a finished job. `url`: the link to its stored PNG file."""

    index: int
    seed: int
    nsfw: bool = False
    url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample in a job's record; `url` and `sha256` are empty until its image is stored.
    `error`: why a job with `allow_partial` succeeded without it."""

    index: int
    seed: int
    url: str
    sha256: str
    size_bytes: int
    nsfw: bool
    error: JobError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Duration of each stage of an ended job. `steps` are summed over the samples; `batch_share` is
    the job's mean share of the device batch, 0 to 1."""

    queue_seconds: float
    held_seconds: float
    fetch_seconds: float
    prepare_seconds: float
    encode_seconds: float
    denoise_seconds: float
    paused_seconds: float
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
    """The reason why a job failed. Branch on `reason`. If `retryable`, the same request may succeed
    later.
    """

    reason: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of a job that was not created. `device_seconds` is 0 and the times are None while no
    worker has measured the model. `currency` is empty without a price. `denoising_steps` is None if
    the service does not know it; with strength as a noise level, it is approximate."""

    spec: Spec
    warning: str
    device_seconds: float
    position: int
    wait_seconds: float | None
    eta_seconds: float | None
    price: float
    currency: str
    denoising_steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The record of a job. `name` is "jobs/{id}"; `future_urls` are the links that will work once
    the images are stored. `start_noise` is the share of noise that the first step began with, 0 to
    1, `device_seconds` the time of the device that the job used; both are 0 until the job has
    succeeded."""

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
    denoising_steps: int
    start_noise: float
    state_reason: str
    device_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that the service serves; the first scheduler is the default. Its limits apply to
    requests for this model; 0: the service is too old to report the limit. `scheduler_max_steps`
    has the schedulers that allow fewer steps than `max_num_inference_steps`."""

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
    kind: ModelKind
    guidance: Guidance
    strength_rule: StrengthRule
    takes_negative_prompt: bool
    scheduler_max_steps: Mapping[str, int]
    takes_prompt_weights: bool
    max_clip_skip: int  # 0: clip_skip has no effect
    embeddings: tuple[str, ...]  # words of prompts with textual inversion embeddings
    state: ModelState
    load_failures: tuple[str, ...]  # why workers could not load it
    refused_loras: Mapping[str, str]  # why LoRA files of the operator do not fit it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a request; a model may have narrower ones. 0: the service is too old to report
    the limit."""

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
    max_clip_skip: int
    max_loras: int
    min_lora_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The models that the service serves and its limits; the first model is the default."""

    server_version: str
    models: tuple[Model, ...]
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Tenant and permissions of an API key. `key_id` is the id of the key in the server's log;
    `label`: the operator's text; `expire_time`: from then on the key is refused, None: never."""

    tenant: str
    key_id: str
    permissions: tuple[str, ...]
    label: str = ""
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A job that succeeded, and its images ordered by sample. With `allow_partial`, images can be
    missing; `job.samples` has their errors."""

    job: Job
    images: tuple[GeneratedImage, ...]


# The event with the image has expired, so only the image's link remains.
_EXPIRED = Image(data=b"", media_type="", size_bytes=0, sha256="", width=0, height=0)


def failure_of(job: Job) -> JobEndError | None:
    """Returns the error of a job that ended without images, None for all other jobs."""
    if job.state is State.FAILED:
        return JobFailedError(job)
    return JobCancelledError(job) if job.state is State.CANCELLED else None


def result_of(job: Job, images: Mapping[int, Image]) -> Result:
    """Joins an ended job's record with the inline images of its samples.

    Raises:
        JobFailedError, JobCancelledError: the job did not succeed.
    """
    if failure := failure_of(job):
        raise failure
    joined = []
    for sample in job.samples:
        if sample.error and sample.index not in images:
            continue
        inline = asdict(images.get(sample.index, _EXPIRED))
        facts = {name: getattr(sample, name) for name in ("index", "seed", "nsfw", "url")}
        joined.append(GeneratedImage(**inline, **facts))
    return Result(job=job, images=tuple(joined))
