"""Says what is wrong with a path at which no model is found, and what to name in its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from img2img_server.engine.checkpoint_file import read_checkpoint
from img2img_server.engine.family import INDEX, ModelError, read_json
from img2img_server.engine.file_kinds import other_formats

_MOST_FILES: Final = 5


def fault_of_path(source: str) -> str:
    """Returns the end of a sentence about a path at which nothing is: the path, what is wrong with
    it, and what to do.
    """
    if re.match(r"\w+://", source):
        if hub := re.match(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", source):
            return f"{source}, which is the address of a page: name its hub id, {hub[1]}"
        return (
            f"{source}, which is an address, not a path: download the model, and name its folder "
            "or file"
        )
    if (bare := source.strip("\"' \t\r\n")) != source:
        why = f"{source!r}, which has quotes or spaces around the path"
        return f"{why}: remove them, and name {bare}"
    if source.startswith("~"):
        return f"{source}: no shell has replaced ~ by a home directory: write the whole path"
    if "\\" in source:
        return f"{source}, a path with backslashes of another system: write the path with /"
    return f"{source}: correct the path, or fetch the model to it"


def hint_of_folder(folder: Path) -> str:
    """Returns what to name in place of a folder that is no model, as the end of a sentence."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f" that can be read ({error.strerror}): correct its permissions"
    if not names:
        return (
            ": it is empty: fetch the model into it, or mount the folder or file that it stands for"
        )
    models = [name for name in names if (folder / name / INDEX).is_file()]
    if models:
        return f", but its subfolder {models[0]} has one: name {folder / models[0]}"
    snapshots = sorted(folder.glob(f"snapshots/*/{INDEX}"))
    if snapshots:
        return f": it is a repository of the hub's cache: name {snapshots[-1].parent}"
    if spelt := next((name for name in names if name.lower() == INDEX), ""):
        return f": rename {spelt} to {INDEX}"
    if (folder.parent / INDEX).is_file():
        return f": it is a part of a model: name {folder.parent}"
    if "config.json" in names:
        config = read_json(folder / "config.json")
        kinds = config.get("architectures") or [config.get("_class_name") or "one network"]
        return f": it holds {kinds[0]} only: name a folder with all parts of a model"
    files = [name for name in names if name.endswith(".safetensors")]
    if files:
        return _hint_of_files(folder, files)
    if hint := other_formats(folder, names):
        return f": {hint}"
    return ": name the folder that has this file, or fetch the model again"


def _hint_of_files(folder: Path, files: list[str]) -> str:
    """Returns what to name in place of a folder with single files, as the end of a sentence."""
    models, fault = [], ""
    for name in files:
        try:
            read_checkpoint(folder / name)
        except ModelError as error:
            fault = fault or f": {error}"
        else:
            models.append(name)
    if not models:
        return fault
    if len(models) == 1:
        return f": to serve its single file, name it: {folder / models[0]}"
    more = f" and {len(models) - _MOST_FILES} more" if len(models) > _MOST_FILES else ""
    return (
        f": it has {len(models)} single files: name one of them, such as {folder / models[0]} "
        f"({', '.join(models[:_MOST_FILES])}{more}), or list them in IMG2IMG_MODELS_FILE"
    )
