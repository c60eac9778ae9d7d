"""Computes from its files how much memory the weights of a model will need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from img2img_server.engine.checkpoint import Shapes
from img2img_server.engine.checkpoint_file import read_shapes
from img2img_server.engine.checkpoint_text import file_of, folder_of
from img2img_server.engine.device import choose_dtype
from img2img_server.engine.diffusers.local_model import LocalModel
from img2img_server.engine.family import about_setting
from img2img_server.engine.options import (
    EngineOptions,
    Quantization,
    TextEncoderPlacement,
    vae_folder,
)
from img2img_server.engine.weight_files import TensorEntry, read_header, weights_of


def weights_size(model: LocalModel, options: EngineOptions, device: torch.device) -> int:
    """Returns the bytes of a model's weights on the device, wherever its parts come from. A tiny
    autoencoder is counted if it is a folder.

    Raises:
        ModelError: A file of weights is missing or damaged.
    """
    shapes = read_shapes(model.path) if model.checkpoint is not None else {}
    parts = sum(
        _part_size(model, name, shapes, options, device)
        for name in model.family.parts(model.files)
        if not _stays_on_host(name, model, options, device)
    )
    width = choose_dtype(options.dtype, device).itemsize
    tiny = _other_size("tiny_vae", Path(options.tiny_vae), width) if options.tiny_vae else 0
    return parts + tiny


def _stays_on_host(
    name: str, model: LocalModel, options: EngineOptions, device: torch.device
) -> bool:
    if device.type == "cpu":
        return False
    if name == model.family.denoiser:
        return options.group_offload
    placed = options.text_encoder_placement is TextEncoderPlacement.DEVICE
    return name.startswith("text_encoder") and not placed


def _part_size(
    model: LocalModel, name: str, shapes: Shapes, options: EngineOptions, device: torch.device
) -> int:
    """Returns the size of a part.

    Args:
        shapes: The shapes of the tensors of a single file.
    """
    is_denoiser = name == model.family.denoiser
    if is_denoiser and options.gguf_file is not None:
        with about_setting("gguf_file"):
            return options.gguf_file.stat().st_size
    width = choose_dtype(options.dtype, device).itemsize
    if is_denoiser and options.quantization is not Quantization.OFF:
        width = 1
    pickles = options.allow_pickles
    if name == "vae" and options.vae_dir is not None:
        return _other_size("vae_dir", vae_folder(options.vae_dir), width, pickles)
    if model.checkpoint is None:
        return _folder_size(model.path / name, width, pickles)
    if name in model.checkpoint.prefixes:
        return sum(map(math.prod, model.checkpoint.held(shapes, name).values())) * width
    if options.model_parts_dir is None:
        return 0
    folder = folder_of(options.model_parts_dir, model.family.name) / name
    if folder.is_dir():
        return _other_size("model_parts_dir", folder, width, pickles)
    file = file_of(options.model_parts_dir, model.family.name, name)
    return _other_size("model_parts_dir", file, width, pickles) if file else 0


def _other_size(setting: str, path: Path, width: int, allow_pickles: bool = False) -> int:
    """Returns the size of the weights that a setting names. Errors are about the setting."""
    with about_setting(setting):
        if path.is_file():
            return _size(read_header(path).values(), width)
        return _folder_size(path, width, allow_pickles)


def _folder_size(folder: Path, width: int, allow_pickles: bool) -> int:
    if not (folder / "config.json").is_file():  # a tokenizer or a scheduler
        return 0
    chosen = weights_of(folder, allow_pickles=allow_pickles)
    if chosen.is_pickle:
        return sum((folder / name).stat().st_size for name in chosen.files)
    return sum(_size(header.values(), width) for header in chosen.headers.values())


def _size(entries: Iterable[TensorEntry], width: int) -> int:
    return sum(math.prod(entry.shape) for entry in entries) * width
