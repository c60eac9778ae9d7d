"""Loads an engine by its options and warms it up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from img2img_server.default_dtype import DEFAULT_DTYPE
from img2img_server.engine.device import device_and_dtype
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.local_model import find_model
from img2img_server.engine.diffusers.noise_table import noise_levels
from img2img_server.engine.engine import DiffusionEngine, Offered
from img2img_server.engine.family import ModelError
from img2img_server.engine.memory import MemoryModel, probe_of
from img2img_server.engine.model_spec import (
    ModelDefaults,
    ModelSpec,
    read_model_spec,
    size_faults,
)
from img2img_server.engine.options import EngineOptions, sizes
from img2img_server.engine.turns import DeviceTurns
from img2img_server.malloc import keep_freed_memory

T = TypeVar("T")

_log = logging.getLogger(__name__)


def load_engine(options: EngineOptions, turns: DeviceTurns | None = None) -> DiffusionEngine:
    """Loads the model onto the device and warms it up. Blocks for seconds to minutes.

    Args:
        turns: The turns of the device, if it has more than one engine.

    Raises:
        SettingsError: the device does not exist, or cannot compute with the dtype.
        ModelError: the model cannot be loaded, or its dry run failed.
    """
    turns = turns or DeviceTurns()
    with turns.loading():
        denoiser, spec = load_denoiser(options)
    engine = start_engine(denoiser, spec, options, turns)
    try:
        warm_up(engine, spec, options.warm_up_sizes)
    except BaseException:
        engine.stop()
        raise
    return engine


def start_engine(
    denoiser: DiffusersDenoiser,
    spec: ModelSpec,
    options: EngineOptions,
    turns: DeviceTurns | None = None,
) -> DiffusionEngine:
    """Returns the engine of a loaded model. Its thread starts at once."""
    turns = turns or DeviceTurns()
    memory = MemoryModel(probe_of(denoiser.device), options.memory_limit_bytes, turns)
    kind = denoiser.device.type
    weights = sum(part.bytes for part in denoiser.parts if kind in part.devices)

    def new_loras() -> Offered | None:
        if not denoiser.refresh_loras():
            return None
        return Offered(denoiser.loras, denoiser.refused_loras)

    def new_embeddings() -> Offered | None:
        return Offered(denoiser.embeddings) if denoiser.refresh_embeddings() else None

    return DiffusionEngine(
        denoiser,
        spec,
        options.max_batch_size,
        memory,
        new_loras if options.lora_dir else None,
        new_embeddings if options.embeddings_dir else None,
        turns=turns,
        weights_bytes=weights,
    )


def load_denoiser(options: EngineOptions) -> tuple[DiffusersDenoiser, ModelSpec]:
    """Loads the model onto the device. Blocks for seconds to minutes.

    Raises:
        SettingsError: the device does not exist, or cannot compute with the dtype.
        ModelError: the model cannot be loaded.
    """
    device, dtype = device_and_dtype(options.device, options.dtype)
    defaults = ModelDefaults.of(options)
    spec = read_model_spec(options.model, defaults=defaults)
    model = find_model(
        spec.source,
        model_name=options.model_name,
        gguf_file=options.gguf_file,
        allow_pickles=options.allow_pickles,
    )
    if model.checkpoint is not None or str(model.path) != spec.source:
        spec = read_model_spec(options.model, model, defaults)
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    _log.info("model_loading: %s on %s as %s", spec.name, device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    if options.compile_cache_dir:
        # torch reads the folder of the cache of compiled code from the environment only.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options.compile_cache_dir.absolute())
    most = options.max_batch_size
    denoiser = on_own_thread(lambda: DiffusersDenoiser.load(model, device, dtype, options, most))
    return denoiser, replace(
        spec,
        loras=denoiser.loras,
        refused_loras=denoiser.refused_loras,
        embeddings=denoiser.embeddings,
        noise_levels=noise_levels(denoiser.schedules, spec.info),
    )


def warm_up(engine: DiffusionEngine, spec: ModelSpec, warm_up_sizes: str) -> None:
    """Runs each size of the setting once, so that the first jobs are not slower.

    Raises:
        ModelError: a size failed.
    """
    for fault in size_faults(warm_up_sizes, spec):
        raise ModelError(fault, "warm_up_sizes")
    for height, width in sizes(warm_up_sizes):
        began = time.monotonic()
        try:
            engine.warm_up(height, width)
        except Exception as error:
            raise ModelError(
                f"model {spec.name} does not run at {width}x{height}: {error}"
            ) from error
        _log.info("warmed_up: %dx%d after %.1f s", width, height, time.monotonic() - began)


def on_own_thread(work: Callable[[], T]) -> T:
    """Loads a model on a thread that ends afterwards, together with its OpenMP threads.

    OpenMP keeps its threads as long as the thread that started them. If there are more of them than
    cores, waiting threads go to sleep almost at once. With four OpenMP threads on two cores, steps
    took a tenth longer and decodes a quarter.
    """
    with ThreadPoolExecutor(1, "engine-load") as thread:
        return thread.submit(_with_default_dtype, work).result()


def _with_default_dtype(work: Callable[[], T]) -> T:
    with DEFAULT_DTYPE.restored():
        return work()
