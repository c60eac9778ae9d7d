"""Reads the device and the number type of the settings. It imports torch but no model library, so
that a missing device is reported before a model is loaded.
"""

from __future__ import annotations

from typing import Final

import torch

from img2img_server.settings import SettingsError

_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def device_and_dtype(device_name: str, dtype_name: str) -> tuple[torch.device, torch.dtype]:
    """Returns the device and dtype of these settings. Raises SettingsError with every mistake."""
    mistakes: list[str] = []
    device = torch.device("cpu")
    try:
        device = choose_device(device_name)
    except SettingsError as error:
        mistakes += error.mistakes
    try:
        dtype = choose_dtype(dtype_name, device)
    except SettingsError as error:
        raise SettingsError(*mistakes, *error.mistakes) from error
    if mistakes:
        raise SettingsError(*mistakes)
    return device, dtype


def choose_device(name: str) -> torch.device:
    """Returns the device of a setting: auto means the GPU, if there is one.

    Raises:
        SettingsError: the device does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(
            f"IMG2IMG_DEVICE: {name!r} is no device: use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"torch finds {count} GPUs here" if count else _why_no_gpu()
        raise SettingsError(f"IMG2IMG_DEVICE: {name} is not there: {found}")
    return device


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "the installed torch is a build for CPUs only"
    return "torch finds no GPU here"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a setting: auto means float32 on a CPU and bfloat16 on a GPU.

    Raises:
        SettingsError: the dtype does not exist, or the device cannot compute with it.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise SettingsError(f"IMG2IMG_DTYPE: {name!r} is no dtype: use auto, {known}")
    return _DTYPES[name]
