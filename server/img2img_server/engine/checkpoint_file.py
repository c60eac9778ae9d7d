"""Reads what a single-file checkpoint holds, with the settings in a TOML file next to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from img2img_server.engine.checkpoint import (
    Checkpoint,
    Hints,
    Shapes,
    Value,
    check_known,
    complete,
    describe_unet,
)
from img2img_server.engine.checkpoint_flow import describe_flow
from img2img_server.engine.family import INDEX, ModelError, toml_entry
from img2img_server.engine.file_kinds import format_of
from img2img_server.engine.tensor_names import DENOISER, first_names, full_name
from img2img_server.engine.weight_files import (
    check_kind,
    check_numbers,
    is_pickle,
    read_header,
    read_metadata,
    refuse_pickle,
)


def read_checkpoint(path: Path, *, model_name: str = "", allow_pickles: bool = False) -> Checkpoint:
    """Returns what a single file holds.

    Args:
        model_name: The name that the operator's settings give the model.

    Raises:
        ModelError: The file is damaged, a pickle that is not allowed, or no checkpoint.
    """
    metadata: Mapping[str, str] = {}
    suffix = path.suffix.lower()
    if is_pickle(path):
        refuse_pickle(path, allow_pickles)
        shapes = read_shapes(path)
    elif suffix == ".safetensors":
        shapes, metadata = read_shapes(path), read_metadata(path)
    elif suffix == ".gguf":
        raise ModelError(
            f"{path} has the weights of the denoiser only: name it with IMG2IMG_GGUF_FILE, and its "
            "base model with IMG2IMG_MODEL"
        )
    else:
        raise ModelError(f"{path} {_fault_of_other(path)}")
    toml = toml_of(path)
    names = (str(path), str(path.resolve()), toml_entry(toml, "name"), model_name)
    hints = Hints.of(names, metadata, toml_entry(toml, "prediction_type"))
    with complete(str(path)):
        if (found := describe_flow(shapes, hints, str(path))) is None:
            return describe_unet(shapes, hints, str(path))
    check_known(shapes, found, str(path))
    return found


def _fault_of_other(path: Path) -> str:
    """Returns the end of a sentence about a file that has not the name of a checkpoint."""
    if path.name == INDEX:
        return f"is the index of a model: name its folder, {path.parent}"
    check_kind(path)
    try:
        read_header(path)
    except ModelError:
        form = format_of([path.name])
        made = f", but a file in the format of {form}" if form else ""
        return (
            f"is no model{made}: a model is a directory in diffusers' layout or a file with the "
            "suffix .safetensors: name one of these"
        )
    return f"is a safetensors file by its content: rename it to {path.stem}.safetensors"


def read_shapes(path: Path) -> Shapes:
    """Returns the shapes of the tensors of a single file by their full names.

    Raises:
        ModelError: The file is damaged, or has a tensor twice.
    """
    if is_pickle(path):
        # Importing torch takes seconds.
        from img2img_server.engine.diffusers.single_file import read_tensors

        return {name: tuple(it.shape) for name, it in read_tensors(path).items()}
    header = read_header(path)
    check_numbers(path, header)
    return with_full_names({name: it.shape for name, it in header.items()}, path)


def with_full_names(found: Mapping[str, Value], path: Path) -> dict[str, Value]:
    """Returns a mapping with the full names of tensors as keys. Raises ModelError if one is there
    twice."""
    named = {full_name(name): value for name, value in found.items()}
    if len(named) < len(found):
        twice = [name for name in found if full_name(name) != name and full_name(name) in found]
        raise ModelError(
            f"{path} has tensors under two names, with and without {DENOISER}: "
            f"{first_names(twice)}: use a file that has each of them once"
        )
    return named


def toml_of(path: Path) -> Path:
    """Returns the path of the TOML file with the settings of a single file."""
    return path.with_suffix(".toml")
