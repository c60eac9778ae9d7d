"""Computes from its files how much memory the weights of a model will need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from img2img_server.engine.checkpoint import Checkpoint
from img2img_server.engine.checkpoint_file import read_shapes
from img2img_server.engine.checkpoint_text import file_of, folder_of
from img2img_server.engine.device import choose_dtype
from img2img_server.engine.diffusers.local_model import LocalModel
from img2img_server.engine.options import EngineOptions, Quantization, TextEncoderPlacement
from img2img_server.engine.weight_files import TensorEntry, read_header, weights_of


def weights_size(model: LocalModel, options: EngineOptions, device: torch.device) -> int:
    """Returns the bytes of a model's weights on the device. Parts that a single file does not hold
    are counted where the folder of parts has them.

    Raises:
        ModelError: A file of weights is missing or damaged.
    """
    return sum(
        _part_size(model, name, options, device)
        for name in model.family.parts(model.files)
        if not _stays_on_host(name, model, options, device)
    )


def _stays_on_host(
    name: str, model: LocalModel, options: EngineOptions, device: torch.device
) -> bool:
    if device.type == "cpu":
        return False
    if name == model.family.denoiser:
        return options.group_offload
    placed = options.text_encoder_placement is TextEncoderPlacement.DEVICE
    return name.startswith("text_encoder") and not placed


def _part_size(model: LocalModel, name: str, options: EngineOptions, device: torch.device) -> int:
    is_denoiser = name == model.family.denoiser
    if is_denoiser and options.gguf_file is not None:
        return options.gguf_file.stat().st_size
    width = choose_dtype(options.dtype, device).itemsize
    if is_denoiser and options.quantization is not Quantization.OFF:
        width = 1
    if model.checkpoint is not None:
        return _single_file_size(model, model.checkpoint, name, options, width)
    return _folder_size(model.path / name, width, allow_pickles=options.allow_pickles)


def _single_file_size(
    model: LocalModel, checkpoint: Checkpoint, name: str, options: EngineOptions, width: int
) -> int:
    """Returns the size of a part that a single file or the folder of parts holds."""
    if (prefix := checkpoint.prefixes.get(name)) is not None:
        others = tuple(it for it in checkpoint.prefixes.values() if len(it) > len(prefix))
        shapes = read_shapes(model.path)
        held = (
            math.prod(shape)
            for key, shape in shapes.items()
            if key.startswith(prefix) and not key.startswith(others)
        )
        return sum(held) * width
    if (parts := options.model_parts_dir) is None:
        return 0
    folder = folder_of(parts, model.family.name) / name
    if folder.is_dir():
        return _folder_size(folder, width, allow_pickles=options.allow_pickles)
    file = file_of(parts, model.family.name, name)
    return _size(read_header(file).values(), width) if file else 0


def _folder_size(folder: Path, width: int, *, allow_pickles: bool) -> int:
    if not (folder / "config.json").is_file():  # a tokenizer or a scheduler
        return 0
    chosen = weights_of(folder, allow_pickles=allow_pickles)
    files = [folder / name for name in chosen.files]
    if chosen.is_pickle:
        return sum(file.stat().st_size for file in files)
    return sum(_size(read_header(file).values(), width) for file in files)


def _size(entries: Iterable[TensorEntry], width: int) -> int:
    return sum(math.prod(entry.shape) for entry in entries) * width
