"""Finds the files of a model on this machine, and downloads those of a hub id."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from img2img_server.domain.hub_id import HubId
from img2img_server.engine.checkpoint import Checkpoint
from img2img_server.engine.checkpoint_file import read_checkpoint
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.family import ModelError, ModelFiles
from img2img_server.engine.hub import download_model


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose files are on this machine.

    Attributes:
        path: The folder in diffusers' layout, or a single file.
        files: The contents of its JSON files; those of a single file are derived.
        checkpoint: The contents of a single file; None for a folder.
    """

    path: Path
    files: ModelFiles
    family: Family
    checkpoint: Checkpoint | None = None


def find_model(
    source: str,
    *,
    model_name: str = "",
    gguf_file: Path | None = None,
    allow_pickles: bool = False,
) -> LocalModel:
    """Returns the model of a directory, hub id or single file. Downloads the files of a hub id.

    Args:
        model_name, gguf_file: The settings of these names.

    Raises:
        ModelError: The model cannot be downloaded, or no family serves it.
    """
    path = Path(source)
    if path.is_file():
        checkpoint = read_checkpoint(path, model_name=model_name, allow_pickles=allow_pickles)
        files = checkpoint.files.named(gguf_file=gguf_file)
        return LocalModel(path, files, detect(files, source), checkpoint)
    hub_id = None if path.is_dir() else HubId.parse(source)
    if hub_id is not None:
        path = download_model(
            hub_id, partial(parts_to_load, source=source), allow_pickles=allow_pickles
        )
    files = ModelFiles.read(path, str(hub_id or "")).named(model_name, gguf_file)
    return LocalModel(path, files, detect(files, source))


def parts_to_load(files: ModelFiles, source: str) -> Collection[str]:
    """Returns the parts to download. Raises ModelError if the model cannot be served."""
    files = replace(files, names=(source,))
    family = detect(files, source)
    if reason := family.refusal(files):
        raise ModelError(f"{source}: {reason}")
    family.check_parts(files)
    return family.parts(files)
