"""From settings to an engine that is ready to serve."""

from __future__ import annotations

import logging
import queue

import numpy as np
import torch

from img2img_server.domain.params import Lane
from img2img_server.engine.base import (
    EngineEvent,
    EngineJob,
    JobDone,
    JobError,
    JobStopped,
)
from img2img_server.engine.diffusers_denoiser import DiffusersDenoiser
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.model_spec import ModelError, ModelSpec, read_model_spec
from img2img_server.settings import Settings

_log = logging.getLogger(__name__)

_WARM_UP_SIDE = 512
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_engine(settings: Settings) -> DiffusionEngine:
    """Loads the model onto the device and runs it once. Blocks for seconds to minutes.

    Raises:
        ModelError: the model cannot be loaded, or its dry run failed.
    """
    spec = read_model_spec(settings.model)
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    _log.info("loading model %s on %s as %s", spec.name, device, dtype)
    denoiser = DiffusersDenoiser.load(spec.source, device, dtype)
    engine = DiffusionEngine(denoiser, spec, settings.max_batch_rows)
    try:
        warm_up(engine, spec)
    except BaseException:
        engine.stop()
        raise
    return engine


def choose_device(name: str) -> torch.device:
    """The device of a setting: auto is the GPU where there is one.

    Raises:
        ModelError: there is no such device.
    """
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"{name!r} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not has_cuda:
        raise ModelError(f"device {name} is not there")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a setting: auto is float32 on CPUs, few of which are faster with less.

    Raises:
        ModelError: there is no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ModelError(f"{name!r} is no dtype: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def warm_up(engine: DiffusionEngine, spec: ModelSpec) -> None:
    """Runs one small job, so that the first real one pays for nothing.

    Raises:
        ModelError: it failed.
    """
    events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
    job = EngineJob(
        job_id=-1,
        tenant="",
        lane=Lane.REALTIME,
        prompt="",
        negative_prompt="",
        init_image=np.zeros((_WARM_UP_SIDE, _WARM_UP_SIDE, 3), dtype=np.uint8),
        strength=1.0,
        seeds=(0,),
        num_inference_steps=1,
        guidance_scale=spec.guidance_scale,
        scheduler=spec.scheduler,
    )
    engine.submit(job, events.put)
    while True:
        match events.get():
            case JobDone():
                return
            case JobError(error):
                raise ModelError(f"model {spec.name} does not run: {error}") from error
            case JobStopped():
                raise ModelError("stopped while loading")
