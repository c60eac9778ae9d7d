"""Computes from its files how much memory the weights of a model will need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from img2img_server.engine.device import choose_dtype
from img2img_server.engine.diffusers.local_model import LocalModel
from img2img_server.engine.options import EngineOptions, Quantization, TextEncoderPlacement
from img2img_server.engine.weight_files import TensorEntry, read_header, weights_of


def weights_size(model: LocalModel, options: EngineOptions, device: torch.device) -> int:
    """Returns the bytes of a model's weights on the device. Parts that a single file does not hold
    are not counted.

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
        prefix = model.checkpoint.prefixes.get(name)
        entries = read_header(model.path) if model.path.suffix == ".safetensors" else {}
        held = (entry for key, entry in entries.items() if prefix and key.startswith(prefix))
        return _size(held, width)
    return _folder_size(model.path / name, width, allow_pickles=options.allow_pickles)


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
