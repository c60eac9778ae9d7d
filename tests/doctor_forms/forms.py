"""Forms of models on a disk, valid and broken, and what `img2img-server doctor` must say of each.

The forms were written from experience with model folders, before the messages of the service were
read: the patterns of a form are what a good report contains, not what the report contains.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import original_layout
from tests.tiny_models import write_sd, write_sdxl

# Settings without their prefix.
Settings = Mapping[str, Path | str]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a213814aa6a1d3d8f08bfa1d9b1ad7ad1d6c9bd0a0f3d2a1a9d1f5e6c7b8a\n"
    b"size 3438167536\n"
)
PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head>"
    b"<body>You must be logged in to download this file.</body></html>\n"
)


def advice(*verbs: str) -> str:
    """Returns a pattern of an imperative, or of a verb after "must", "can" and the like."""
    start = r"(?:^|[.;:,(]\s*|\b(?:and|or|then|to|must|should|can|instead of)\s+)"
    return rf"{start}(?:{'|'.join(verbs)})\b"


AGAIN = advice("download", "fetch", "copy", "replace", "restore", "run", "pull", "get")
CORRECT = advice("correct", "fix", "remove", "write", "save", "replace", "edit", "change", "store")
SERVE = advice("use", "serve", "choose", "set", "name", "give", "take", "put", "download", "fetch")
UNPACK = advice("unpack", "extract", "unzip")
ALLOW = advice("correct", "chmod", "chown", "allow", "grant", "give", "let", "make", "change")


@dataclass(frozen=True, slots=True)
class Form:
    """A form on a disk.

    Attributes:
        build: Writes the form, and returns the settings without their prefix.
        says: Patterns that one sentence of the report has, next to `advice`. None: nothing is wrong
            with the form.
        starts: Whether a worker would start; None: either.
    """

    build: Callable[[Builder], Settings]
    says: tuple[str, ...] | None
    advice: str
    starts: bool | None


FORMS: dict[str, Form] = {}


def broken(
    *says: str, advice: str, starts: bool | None = False
) -> Callable[[Callable[[Builder], Any]], Callable[[Builder], Any]]:
    """Registers a form of which doctor has something to say."""

    def register(build: Callable[[Builder], Any]) -> Callable[[Builder], Any]:
        assert build.__name__ not in FORMS
        FORMS[build.__name__] = Form(build, says, advice, starts)
        return build

    return register


def valid(build: Callable[[Builder], Any]) -> Callable[[Builder], Any]:
    """Registers a form with which nothing is wrong."""
    assert build.__name__ not in FORMS
    FORMS[build.__name__] = Form(build, None, "", True)
    return build


class Stock:
    """Undamaged small models, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def sd(self) -> Path:
        """A folder of the SD 1.x kind."""
        return write_sd(self._folder / "sd")

    @cached_property
    def sdxl(self) -> Path:
        """A folder of the SDXL kind."""
        return write_sdxl(self._folder / "sdxl")

    @cached_property
    def single(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a single file of the SD 1.x kind."""
        return load_file(original_layout.write_sd1(self._folder)[1])


@dataclass(frozen=True, slots=True)
class Builder:
    """Writes one form into an empty folder."""

    folder: Path
    stock: Stock

    def sd(self, name: str = "model") -> Path:
        """Returns a copy of the SD folder."""
        shutil.copytree(self.stock.sd, self.folder / name)
        return self.folder / name

    def sdxl(self) -> Path:
        """Returns a copy of the SDXL folder."""
        shutil.copytree(self.stock.sdxl, self.folder / "model")
        return self.folder / "model"

    def single(self, name: str, change: Callable[[str], str | None] = str) -> Path:
        """Writes the tensors of the single file under changed names; None leaves one out."""
        tensors = {change(key): it for key, it in self.stock.single.items()}
        return self.tensors(name, {key: it for key, it in tensors.items() if key})

    def tensors(self, name: str, tensors: Mapping[str, Any], **metadata: str) -> Path:
        """Writes a safetensors file. A tuple or list is the shape of a random tensor."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        random = {
            key: torch.randn(*it) * 0.02 if isinstance(it, (tuple, list)) else it.clone()
            for key, it in tensors.items()
        }
        save_file(random, file, metadata or None)
        return file

    def bytes(self, name: str, content: bytes) -> Path:
        """Writes a file."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def json(self, name: str, content: Any) -> Path:
        """Writes a JSON file."""
        return self.bytes(name, json.dumps(content, indent=2).encode())


def edit(file: Path, **changes: Any) -> None:
    """Changes entries of a JSON object; None removes one."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def cut(file: Path, share: float = 0.6) -> None:
    """Keeps the first part of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def change_tensors(
    file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Writes a safetensors file again with changed tensors."""
    tensors = change({key: it.clone() for key, it in load_file(file).items()})
    save_file(tensors, file, {"format": "pt"})


def matches(pattern: str, sentence: str) -> bool:
    """Returns whether a pattern is in a sentence, in any case."""
    return re.search(pattern, sentence, re.IGNORECASE) is not None


def lora(width: int, *, prefix: str = "lora_unet_", rank: int = 2) -> dict[str, list[int]]:
    """Returns the shapes of a LoRA of kohya for one cross-attention of the SD folder."""
    layer = f"{prefix}down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {
        f"{layer}.lora_down.weight": [rank, width],
        f"{layer}.lora_up.weight": [16, rank],
    }
