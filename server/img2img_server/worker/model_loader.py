"""Loads and unloads the models of a catalogue."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import structlog

from img2img_server.domain.models import ModelInfo
from img2img_server.engine.base import Engine
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.engine.family import ModelError
from img2img_server.engine.options import EngineOptions
from img2img_server.errors import SafetyCheckError
from img2img_server.malloc import trim
from img2img_server.safety import safety_checker
from img2img_server.safety.base import SafetyChecker
from img2img_server.setting_names import variable
from img2img_server.settings import Settings, SettingsError

FREE_SHARE: Final = 5  # this part of the memory remains free without a budget: a fifth
LEAST_SHARE: Final = 20  # A twentieth must remain free even if models with jobs are unloaded.
DOWNLOADS: Final = 8  # most models that are downloaded at a time
STOP_SECONDS: Final = 10.0  # longest wait for the threads of an engine when the process ends
# The same before another model is loaded: the weights are in memory until the step ends.
UNLOAD_SECONDS: Final = 120.0

log = structlog.get_logger()


class NoRoomError(ModelError):
    """The device had too little memory to load a model."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model whose files are on this machine: what callers see of it, and the bytes of its
    weights once they are loaded; 0: not known.
    """

    info: ModelInfo
    size: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that runs jobs."""

    engine: Engine
    safety: SafetyChecker
    size: int


class ModelLoader(Protocol):
    """Loads and unloads models."""

    async def find(self, model: CatalogueModel) -> FoundModel:
        """Finds the files of a model, and downloads those of a hub id.

        Raises:
            Exception: It cannot be served; the message says why.
        """
        ...

    async def loras(self, model: CatalogueModel) -> tuple[str, ...]:
        """Returns the names of the LoRA files of a model, by name."""
        ...

    async def load(self, model: CatalogueModel) -> LoadedModel:
        """Loads a model that was found.

        Raises:
            NoRoomError: The device has too little memory.
            Exception: It cannot be loaded; the message says why.
        """
        ...

    async def unload(self, model: LoadedModel, seconds: float = STOP_SECONDS) -> None:
        """Ends the engine of a model. `reclaim` returns the memory once nothing refers to it.

        Args:
            seconds: The longest wait for the end of a step.
        """
        ...

    async def reclaim(self) -> None:
        """Returns the memory of unloaded models to the device and the system."""
        ...

    def has_room(self, size: int, freed: int, used: int) -> bool:
        """Returns whether a model fits after others were unloaded.

        Args:
            size: The bytes of its weights.
            freed: The bytes of the models that would be unloaded.
            used: The bytes of all loaded models.
        """
        ...

    async def measure(self) -> None:
        """Measures the memory for `has_room` and `is_full`, between the steps of the engines."""
        ...

    def is_full(self, used: int) -> bool:
        """Returns whether even a model with jobs must be unloaded."""
        ...


class EngineLoader:
    """The ModelLoader of the service: all models run on one device, which they use in turns."""

    def __init__(self, settings: Settings) -> None:
        # Importing torch takes seconds; the worker has imported it to check the device.
        from img2img_server.engine.device import device_and_dtype
        from img2img_server.engine.turns import DeviceTurns

        self._device, _ = device_and_dtype(settings.device, settings.dtype)
        self._budget = settings.models_memory_bytes
        self._turns = DeviceTurns()
        self._measured: tuple[int, int] | None = None
        # A download takes hours, for which it must not take a thread of the other tasks.
        self._downloaders = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="download-model")
        self._shared: SafetyChecker | None = None
        if settings.safety_checker != "model":
            self._shared = safety_checker(settings, "")

    async def warm_up(self) -> None:
        """Loads the safety checker that all models share. Raises SafetyCheckError."""
        if self._shared:
            await self._shared.warm_up()

    async def find(self, model: CatalogueModel) -> FoundModel:
        is_local = await asyncio.to_thread(_is_local, model.settings.model)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            None if is_local else self._downloaders, self._find, model
        )

    def _find(self, model: CatalogueModel) -> FoundModel:
        # Importing diffusers takes seconds.
        from img2img_server.engine.diffusers.local_model import find_model
        from img2img_server.engine.diffusers.noise_table import noise_levels
        from img2img_server.engine.diffusers.schedules import schedules_of
        from img2img_server.engine.diffusers.weights_size import weights_size
        from img2img_server.engine.model_spec import (
            ModelDefaults,
            packaged_model,
            read_model_spec,
            size_faults,
        )

        settings = model.settings
        options = EngineOptions.of(settings)
        defaults = ModelDefaults.of(settings)
        read_model_spec(settings.model, defaults=defaults)  # It names a missing model best.
        source = settings.model or str(packaged_model())
        found = find_model(
            source,
            model_name=settings.model_name,
            gguf_file=settings.gguf_file,
            allow_pickles=settings.allow_pickles,
        )
        spec = read_model_spec(settings.model, found, defaults)
        for fault in size_faults(settings.warm_up_sizes, spec):
            raise ModelError(fault, "warm_up_sizes")
        info = replace(
            spec.info,
            loras=_lora_names(settings.lora_dir),
            noise_levels=noise_levels(schedules_of(found.family, found.files), spec.info),
        )
        size = weights_size(found, options, self._device)
        self._check_size(size)
        return FoundModel(info, size)

    def _check_size(self, size: int) -> None:
        """Raises ModelError for a model that does not fit even alone."""
        if self._budget and size > self._budget:
            raise ModelError(
                f"its weights need {size} bytes, more than IMG2IMG_MODELS_MEMORY_BYTES "
                f"({self._budget}) allows"
            )

    async def loras(self, model: CatalogueModel) -> tuple[str, ...]:
        return await asyncio.to_thread(_lora_names, model.settings.lora_dir)

    async def load(self, model: CatalogueModel) -> LoadedModel:
        safety = self._shared or safety_checker(model.settings, model.settings.model)
        engine, size = await asyncio.to_thread(self._load, model)
        try:
            await safety.warm_up()
        except SafetyCheckError as error:
            await asyncio.to_thread(engine.stop)
            reason = f"{variable('safety_checker')}: {error}: {error.__cause__ or error}"
            raise SettingsError(reason) from error
        return LoadedModel(engine, safety, size)

    def _load(self, model: CatalogueModel) -> tuple[Engine, int]:
        from img2img_server.engine.load import load_engine

        try:
            engine = load_engine(EngineOptions.of(model.settings), self._turns)
        except Exception as error:
            if _lacks_memory(error):
                raise NoRoomError(str(error)) from None
            raise
        try:
            self._check_size(engine.weights_bytes)
        except ModelError:
            engine.stop()
            raise
        return engine, engine.weights_bytes

    async def unload(self, model: LoadedModel, seconds: float = STOP_SECONDS) -> None:
        try:
            async with asyncio.timeout(seconds):
                await asyncio.to_thread(model.engine.stop)
        except TimeoutError:  # Its memory stays in use until its step ends.
            log.error("engine_does_not_stop", model=model.engine.model.name)

    async def reclaim(self) -> None:
        await asyncio.to_thread(self._reclaim)

    def _reclaim(self) -> None:
        import torch

        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        trim()

    def has_room(self, size: int, freed: int, used: int) -> bool:
        if self._budget:
            return used - freed + size <= self._budget
        memory = self._measured or self._memory()
        if memory is None:
            return True
        free, total = memory
        return free + freed - size >= total / FREE_SHARE

    def is_full(self, used: int) -> bool:
        if self._budget:
            return used > self._budget
        memory = self._measured or self._memory()
        return memory is not None and memory[0] < memory[1] / LEAST_SHARE

    async def measure(self) -> None:
        if not self._budget:
            await asyncio.to_thread(self._measure)

    def _measure(self) -> None:
        with self._turns.turn():  # The intermediate results of a step are not there then.
            self._measured = self._memory()

    def _memory(self) -> tuple[int, int] | None:
        """Returns the free bytes and all bytes of the device; None where they are not known."""
        import torch

        from img2img_server.engine.host_memory import host_memory
        from img2img_server.engine.memory import probe_of

        if self._device.type != "cuda":
            return host_memory()
        free = probe_of(self._device).free
        return None if free is None else (free, torch.cuda.mem_get_info(self._device)[1])


def _lacks_memory(error: BaseException | None) -> bool:
    """Returns whether an error, or one of its causes, is the lack of memory."""
    from img2img_server.engine.isolation import is_out_of_memory  # Importing torch takes seconds.

    while error is not None:
        if isinstance(error, Exception) and is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_local(source: str) -> bool:
    """Returns whether a model is a file or folder of this machine. Empty: the packaged one."""
    return not source or Path(source).exists()


def _lora_names(folder: Path | None) -> tuple[str, ...]:
    """Returns the names of the LoRA files; whether each fits is known once the model is loaded."""
    if folder is None:
        return ()
    try:
        files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        log.warning("lora_dir_unreadable", why=str(error))
        return ()
    return tuple(sorted({path.stem for path in files if path.suffix.lower() == ".safetensors"}))
