"""What a worker tells about the model it serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as callers see it: its name, its choices and its own defaults."""

    name: str
    family: str
    schedulers: tuple[str, ...]  # the default one first
    default_num_inference_steps: int
    default_guidance_scale: float
    default_strength: float = 0.7
    native_size: int = 512
    max_num_inference_steps: int = 100
    loras: tuple[str, ...] = ()
    # Measured device seconds a pixel-step, batches and encoders included; kept with the model while
    # no worker serves it. 0.0: nothing ran yet.
    pixel_step_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A live worker, announced again and again; it is gone when the announcement expires.

    `capacity_rows`: samples it denoises at once. `job_seconds`: recent mean time of one sample at
    512x512, the base of estimates; 0.0 when nothing ran yet. `busy`: share of the time since the
    announcement before in which the device worked, 0 to 1.
    """

    name: str
    model: ModelInfo
    device: str
    capacity_rows: int
    job_seconds: float = 0.0
    busy: float = 0.0
