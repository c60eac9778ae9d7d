"""Options of the engine for speed and memory. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Self

_SIZE = re.compile(r"(\d+)x(\d+)")


def vae_folder(vae_dir: Path) -> Path:
    """Returns the folder of an autoencoder: the one that is named if it has a config.json, else its
    subfolder vae.
    """
    return vae_dir if (vae_dir / "config.json").is_file() else vae_dir / "vae"


class Compile(StrEnum):
    """The part of the denoiser that torch.compile compiles: nothing, its blocks, or all of it."""

    OFF = "off"
    REGIONAL = "regional"
    WHOLE = "whole"


class TinyVaeUse(StrEnum):
    """The images that a tiny autoencoder decodes: previews only, or all."""

    PREVIEWS = "previews"
    IMAGES = "images"


class TextEncoderPlacement(StrEnum):
    """The place of text encoders: on the device, on the host until they run, or always on
    the host.
    """

    DEVICE = "device"
    OFFLOAD = "offload"
    CPU = "cpu"


class Quantization(StrEnum):
    """The number format of the denoiser's linear weights."""

    OFF = "off"
    INT8 = "int8"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options of a model; the settings of the same names describe the fields."""

    channels_last: bool = True
    fuse_qkv: bool = False
    compile: Compile = Compile.OFF
    vae_tile_pixels: int = 1024 * 1024
    vae_dir: Path | None = None
    tiny_vae: str = ""
    tiny_vae_use: TinyVaeUse = TinyVaeUse.PREVIEWS
    lora_dir: Path | None = None
    embeddings_dir: Path | None = None
    text_encoder_placement: TextEncoderPlacement = TextEncoderPlacement.DEVICE
    quantization: Quantization = Quantization.OFF
    gguf_file: Path | None = None
    group_offload: bool = False
    allow_pickles: bool = False
    model_parts_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ModelOptions):
    """All options of load_engine; the settings of the same names describe the fields."""

    model: str = ""
    model_name: str = ""
    device: str = "auto"
    dtype: str = "auto"
    max_batch_size: int = 8
    torch_threads: int = 0
    compile_cache_dir: Path | None = None
    warm_up_sizes: str = "512x512"
    memory_limit_bytes: int = 0
    default_scheduler: str = ""
    default_num_inference_steps: int = 0
    default_guidance_scale: float = -1.0
    default_strength: float = -1.0
    native_size: int = 0

    @classmethod
    def of(cls, source: object) -> Self:
        """Returns the options from the attributes of the same names, for example of settings."""
        values = {field.name: getattr(source, field.name) for field in fields(cls)}
        values["compile"] = Compile(values["compile"])
        values["tiny_vae_use"] = TinyVaeUse(values["tiny_vae_use"])
        values["quantization"] = Quantization(values["quantization"])
        placement = values["text_encoder_placement"]
        values["text_encoder_placement"] = TextEncoderPlacement(placement)
        return cls(**values)


def batch_size_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Returns the batch sizes to compile or capture: the largest, and powers of two below it."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    return (*sizes, max_batch_size) if max_batch_size > 1 else (1,)


def pad_batch_size(forwards: int, max_batch_size: int) -> int:
    """Returns the smallest bucket with at least this many forwards, or the number itself if no
    bucket is large enough.
    """
    return next((size for size in batch_size_buckets(max_batch_size) if size >= forwards), forwards)


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Returns the heights and widths of a setting.

    >>> sizes("512x512, 768x512")
    ((512, 512), (512, 768))

    Raises:
        ValueError: the text is no list of sizes.
    """
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _SIZE.fullmatch(part)
        if not match:
            raise ValueError(f"{part!r} is no size: write WIDTHxHEIGHT")
        found.append((int(match[2]), int(match[1])))
    return tuple(found)


def limit_spinning() -> None:
    """Makes waiting OpenMP threads sleep soon. Must run before torch is imported.

    OpenMP waits for 300,000 spins, which take milliseconds: on cores that other processes use too,
    the waiting threads keep other threads from running, and a step takes many times as long. With
    3,000 spins a step takes as long as with 300,000 on free cores. An OMP_WAIT_POLICY of the
    environment has precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
