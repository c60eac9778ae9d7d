"""Defines the fields of a request: the options of callers, and the spec that the service returns.

A new field of JobSpec needs one line in Options and one in Spec. Tests compare both with the
protocol.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, Self, TypedDict, runtime_checkable

from img2img_client.uploads import Upload


@runtime_checkable
class ImageFile(Protocol):
    """A file object opened in binary mode, such as io.BytesIO; read from its current position."""

    def read(self) -> bytes:
        """Returns the bytes up to the end."""


@runtime_checkable
class PillowImage(Protocol):
    """The parts of PIL.Image.Image that this client uses. It does not import Pillow."""

    @property
    def mode(self) -> str:
        """The pixel format."""

    def getexif(self) -> Any:
        """Returns the EXIF entries."""

    def convert(self, mode: str) -> Self:
        """Returns a copy with another pixel format."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002
        """Writes the encoded image."""


# A file or its bytes, a file object, a Pillow image, an http(s) URL that the service fetches, or a
# data URI. A str is a URL or a data URI when is_address says so, otherwise a path. Or an Upload,
# which the service has already.
ImageSource = str | os.PathLike[str] | bytes | ImageFile | PillowImage | Upload


# A name, names, names with scales, or scales by name.
Loras = str | Mapping[str, float] | Sequence[str | tuple[str, float]]


class Options(TypedDict, total=False):
    """The fields of JobSpec except prompt and init image. Absent or None: the service's default."""

    negative_prompt: str | None  # description of unwanted content; needs guidance_scale above 1
    # pixels; default: the model's native area at the aspect ratio of the init image
    width: int | None
    height: int | None  # pixels; default: see width
    samples: int | None  # number of images, default 1; image i uses seed + i
    # 0.0 returns the init image, 1.0 ignores it; default: the model's, see capabilities()
    strength: float | None
    seed: int | None  # 0 to 2**63 - 1; absent or -1: drawn at random
    safety_checker: bool | None  # default True
    enhance_prompt: bool | None  # whether the service rewrites the prompt
    base64: bool | None  # whether the images are stored as base64 text files
    temp: bool | None  # whether the files are stored under temp/ for 24 hours
    webhook: str | None  # https URL that receives one POST when the job has ended
    track_id: str | None  # your own reference, returned unchanged
    model: str | None  # name of a model, see capabilities()
    num_inference_steps: int | None  # steps of the schedule; strength x steps run, at least one
    guidance_scale: float | None  # 1.0 and below turn guidance off
    scheduler: str | None  # name of a scheduler, see capabilities()
    # LoRAs of the model, see capabilities(): a name, names, or scales by name; default scale 1.0
    loras: Loras | None
    # Guidance with the negative prompt in models such as FLUX.1; 1.0 and below turn it off.
    true_cfg_scale: float | None
    # "steps" (default): share of steps that run; "noise_level": share of noise at the first step
    strength_mode: str | None
    output_format: str | None  # "png" (default of this client), "jpeg" or "webp"
    preview_interval_steps: int | None  # number of steps between two Preview events; 0: no previews
    lane: str | None  # "realtime" (default) or "batch"
    annotations: Mapping[str, str] | None  # your own notes, returned unchanged
    allow_partial: bool | None  # whether some samples are enough for success, default False
    output_quality: int | None  # quality of "jpeg" and "webp", 1 to 100; default: 95 and 90
    prompt_weights: bool | None  # whether "(words:1.3)" in the prompts is a weight, default False
    clip_skip: int | None  # skipped layers of the CLIP text encoders, default 0


class CreateOptions(Options, total=False):
    """Options of `create`."""

    # a UUID; a second request with the same id returns the same job for 24 hours
    request_id: str | None


class StreamOptions(CreateOptions, total=False):
    """Options of `generate` and `stream`."""

    detach: bool | None  # whether the job continues after the stream is closed
    # limit for the job; the service rejects a job that cannot end in time
    timeout_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA of a job and the scale of its change."""

    name: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The request with the service's defaults and the drawn seed filled in."""

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
    loras: tuple[Lora, ...]
    true_cfg_scale: float | None
    strength_mode: StrengthMode
    allow_partial: bool
    output_quality: int
    prompt_weights: bool
    clip_skip: int


class ImageFormat(StrEnum):
    """Format of the inline images; the stored file behind a link is always PNG."""

    UNSPECIFIED = "unspecified"
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class Lane(StrEnum):
    """Queue lane: realtime is served before batch."""

    UNSPECIFIED = "unspecified"
    REALTIME = "realtime"
    BATCH = "batch"


class StrengthMode(StrEnum):
    """Whether strength is the share of steps that run, or the share of noise at the first step."""

    UNSPECIFIED = "unspecified"
    STEPS = "steps"
    NOISE_LEVEL = "noise_level"
