"""Checks the model, the LoRAs and the device of a worker before it serves: `img2img-server doctor`.

It loads the model with the code of the worker's start, and runs a step of each announced size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from img2img_server.engine.catalogue import read_catalogue
from img2img_server.engine.checkpoint_text import file_of, folder_of
from img2img_server.engine.family import ModelError
from img2img_server.engine.options import EngineOptions, limit_spinning, sizes, vae_folder
from img2img_server.engine.tensor_names import IGNORED, first_names
from img2img_server.engine.weight_files import choose_weights
from img2img_server.exit_reason import reasons_of
from img2img_server.settings import Settings
from img2img_server.worker.load_errors import explain_load_error


@dataclass(slots=True)
class Report:
    """The result of an examination, which can be written as JSON.

    Attributes:
        problems: Why a worker would not start; empty if it would.
        notes: Files and settings that are ignored or replaced.
        parts: The parts of the model with their memory in bytes.
        sizes: The announced sizes, WIDTHxHEIGHT, with the seconds of their first step.
        peaks: The most memory in bytes that the process (on a GPU: torch) had during this step,
            weights included, by size.
    """

    model: str = ""
    source: str = ""
    family: str = ""
    device: str = ""
    dtype: str = ""
    weights_bytes: int = 0
    device_free_bytes: int | None = None
    native_size: int = 0
    schedulers: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    loras: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    load_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_fine(self) -> bool:
        """Whether a worker would start."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        return {"ok": self.is_fine, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """Yields the report as lines of text."""
        if self.model:
            yield f"model {self.model} of the family {self.family}, from {self.source}"
            yield f"device {self.device} as {self.dtype}, loaded in {self.load_seconds:.1f} s"
            for part in self.parts:
                yield f"  {part['name']}: {part['class_name']}, {part['bytes'] / 2**20:.0f} MiB"
            free = self.device_free_bytes
            left = "" if free is None else f", {free / 2**20:.0f} MiB are left on the device"
            yield f"weights: {self.weights_bytes / 2**20:.0f} MiB{left}"
            yield f"schedulers: {', '.join(self.schedulers)}"
            yield "defaults: " + ", ".join(f"{key} {value}" for key, value in self.defaults.items())
            yield f"LoRAs: {', '.join(self.loras) or 'none'}"
            if self.embeddings:
                yield f"embeddings: {', '.join(self.embeddings)}"
            for size, seconds in self.sizes.items():
                peak = f"{self.peaks[size] / 2**20:.0f} MiB"
                yield f"  {size}: runs, {seconds:.1f} s with one step, at most {peak} in use"
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"problem: {problem}" for problem in self.problems)
        yield "a worker would start" if self.is_fine else "a worker would not start"


@dataclass
class CatalogueReport:
    """The reports of the models of a catalogue, by name."""

    models: dict[str, Report]

    @property
    def is_fine(self) -> bool:
        return all(report.is_fine for report in self.models.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        return {
            "ok": self.is_fine,
            "models": {name: report.as_dict() for name, report in self.models.items()},
        }

    def lines(self) -> Iterator[str]:
        """Yields the report as lines of text."""
        for name, report in self.models.items():
            *lines, _ = report.lines()
            yield from (f"{name}: {line}" for line in lines)
            yield f"{name}: {'it can be loaded' if report.is_fine else 'it cannot be loaded'}"
        able = sum(report.is_fine for report in self.models.values())
        yield f"a worker would serve {able} of {len(self.models)} models"


def examine(settings: Settings) -> Report | CatalogueReport:
    """Loads each model of these settings and runs each announced size. Blocks.

    Args:
        settings: Their files and folders were checked.
    """
    if settings.models_file is None:
        return _report(settings)
    models = read_catalogue(settings)
    return CatalogueReport({model.name: _report(model.settings) for model in models})


def _report(settings: Settings) -> Report:
    report = Report()
    limit_spinning()
    if settings.lora_s3_prefix:
        report.notes.append(
            f"of the LoRA files of the prefix {settings.lora_s3_prefix}, those that a worker has "
            f"copied into {settings.lora_dir} are examined"
        )
    with _warnings_in(report.notes):
        try:
            _examine(EngineOptions.of(settings), report)
        except Exception as error:  # the libraries raise errors of many classes
            report.problems += reasons_of(explain_load_error(settings, error))
    return report


def _examine(options: EngineOptions, report: Report) -> None:
    from img2img_server.engine.device_memory import PeakMeter
    from img2img_server.engine.load import load_denoiser, start_engine, warm_up
    from img2img_server.engine.memory import probe_of

    began = time.monotonic()
    denoiser, spec = load_denoiser(options)
    report.load_seconds = time.monotonic() - began
    report.model, report.source, report.family = spec.name, spec.source, spec.family
    report.device = denoiser.device_name
    report.schedulers = list(spec.info.schedulers)
    report.native_size = spec.native_size
    report.loras = list(spec.loras)
    report.embeddings = list(spec.embeddings)
    report.defaults = {
        "num_inference_steps": spec.num_inference_steps,
        "guidance_scale": spec.guidance_scale,
        "strength": spec.strength,
    }
    report.parts = [asdict(part) for part in denoiser.parts]
    report.dtype = ", ".join(sorted({part.dtypes for part in denoiser.parts}))
    report.weights_bytes = sum(part.bytes for part in denoiser.parts)
    report.device_free_bytes = probe_of(denoiser.device).free
    engine = start_engine(denoiser, spec, options)
    try:
        for height, width in sizes(options.warm_up_sizes):
            began = time.monotonic()
            size = f"{width}x{height}"
            try:
                with PeakMeter(denoiser.device) as meter:
                    warm_up(engine, spec, size)
            except ModelError as error:
                if broken := denoiser.weights_not_finite():
                    files = sorted({_file_of(name, spec.source, options) for name in broken})
                    raise ModelError(
                        f"{', '.join(files)} has weights that are not finite "
                        f"({first_names(broken)}): fetch the file again, or use another one"
                    ) from error
                raise
            report.sizes[size] = time.monotonic() - began
            report.peaks[size] = meter.peak
    finally:
        engine.stop()


def _file_of(weight: str, source: str, options: EngineOptions) -> str:
    """Returns the file of a weight that is named PART: NAME, or its folder or model if the file is
    not known.
    """
    from img2img_server.engine.diffusers.local_model import find_model

    part = weight.partition(":")[0]
    folder = Path(source) / part
    if part == "vae" and options.vae_dir is not None:
        folder = vae_folder(options.vae_dir)
    elif options.gguf_file is not None and part in ("unet", "transformer"):
        return str(options.gguf_file)
    elif options.model_parts_dir is not None and Path(source).is_file():
        model = find_model(source, allow_pickles=options.allow_pickles)
        if model.checkpoint is not None and part not in model.checkpoint.prefixes:
            family = model.family.name
            folder = folder_of(options.model_parts_dir, family) / part
            if not folder.is_dir():
                return str(file_of(options.model_parts_dir, family, part) or folder)
    if not folder.is_dir():
        return source
    chosen = choose_weights([it.name for it in folder.iterdir()])
    return str(folder / (chosen.index or chosen.files[0])) if chosen else str(folder)


@contextmanager
def _warnings_in(notes: list[str]) -> Iterator[None]:
    """Appends the warnings that the service logs in the body, and the tensors it ignores."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno >= logging.WARNING or text.startswith(IGNORED):
                notes.append(text)

    handler, logger = Collector(logging.INFO), logging.getLogger("img2img_server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
