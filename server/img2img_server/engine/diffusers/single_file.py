"""Loads the parts of a model from a single-file checkpoint, with the conversions of diffusers."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor

from img2img_server.engine.checkpoint import Checkpoint
from img2img_server.engine.diffusers.clip_tokenizer import clip_tokenizer
from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.diffusers.parts import (
    check_latents,
    check_loaded,
    check_tokenizers,
    guarded,
    load_part,
)
from img2img_server.engine.family import ModelError
from img2img_server.engine.tensor_names import HARMLESS_IN_CHECKPOINT, IGNORED, first_names

# Encoders whose shorter prompts are filled with the token of "!", as those of OpenCLIP.
_FILLED_WITH_ZERO: Final = "!"

_log = logging.getLogger(__name__)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, mapped from the file.

    A pickle must be allowed already; it is read without code.

    Raises:
        ModelError: The file cannot be read.
    """
    if path.suffix == ".safetensors":
        return dict(guarded(path, load_file, str(path)))
    found = guarded(path, torch.load, str(path), map_location="cpu", weights_only=True, mmap=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    tensors = {name: it for name, it in found.items() if isinstance(it, Tensor)}
    if not tensors:
        raise ModelError(f"{path} has no tensors")
    return tensors


def load_single_file(
    family: Family,
    checkpoint: Checkpoint,
    path: Path,
    dtype: torch.dtype,
    *,
    given: Mapping[str, Any],
    parts_dir: Path | None = None,
    quantization: Any = None,
    allow_pickles: bool = False,
) -> dict[str, Any]:
    """Loads all parts of a model from a single file; parts that it does not hold from a folder.

    Args:
        given: Parts that are loaded already.
        parts_dir: The setting of the same purpose; it has a folder for each family.
        quantization: The configuration of the denoiser's quantisation; None: none.

    Returns:
        The arguments of the pipeline.

    Raises:
        ModelError: A part is missing, incomplete, or has tensors that would be ignored.
    """
    tensors = read_tensors(path)
    if ignored := [key for key in tensors if HARMLESS_IN_CHECKPOINT.search(key)]:
        _log.info("%s: %s: %s", IGNORED, path, first_names(ignored))
    parts: dict[str, Any] = dict(given)
    entries = family.parts(checkpoint.files)
    for name, entry in sorted(entries.items()):
        if name in given:
            continue
        config = checkpoint.files.config(name)
        where = f"the {name} in {path}"
        if name in checkpoint.prefixes:
            prefix = checkpoint.prefixes[name]
            own = {key: it for key, it in tensors.items() if key.startswith(prefix)}
            if entry[0] == "diffusers":
                quantiser = quantization if name == family.denoiser else None
                parts[name] = _network(where, entry[1], config, own, dtype, quantiser)
            else:
                parts[name] = _clip(where, entry[1], config, own, prefix, dtype)
        elif config and name == "scheduler":
            parts[name] = getattr(diffusers, entry[1]).from_config(config)
        elif entry[1] == "CLIPTokenizer" and not _has(family, name, checkpoint, parts_dir):
            encoder = checkpoint.prefixes.get(name.replace("tokenizer", "text_encoder"), "")
            is_open = encoder.endswith(".model.") or (family.name, name) == ("sd3", "tokenizer_2")
            parts[name] = clip_tokenizer(_FILLED_WITH_ZERO if is_open else "")
        else:
            parts[name] = _from_folder(family, name, entry, path, parts_dir, dtype, allow_pickles)
    check_tokenizers(parts, str(path))
    check_latents(family, parts, str(path))
    options = {
        name: value
        for name, value in checkpoint.files.index.items()
        if not name.startswith("_") and not isinstance(value, list)
    }
    return {**options, **parts}


def _has(family: Family, tokenizer: str, checkpoint: Checkpoint, parts_dir: Path | None) -> bool:
    """Returns whether a tokenizer is in the folder of parts, together with its text encoder."""
    encoder = tokenizer.replace("tokenizer", "text_encoder")
    is_held = encoder in checkpoint.prefixes
    return not is_held and parts_dir is not None and (parts_dir / family.name / tokenizer).is_dir()


def _from_folder(
    family: Family,
    name: str,
    entry: tuple[str, str],
    path: Path,
    parts_dir: Path | None,
    dtype: torch.dtype,
    allow_pickles: bool,
) -> Any:
    """Returns a part that the file does not hold from the folder of parts."""
    if parts_dir is None:
        raise ModelError(
            f"{path} does not hold the {name} ({entry[1]}) of the family {family.name}: set "
            f"IMG2IMG_MODEL_PARTS_DIR to a folder that has it as {family.name}/{name}"
        )
    folder = parts_dir / family.name
    if not (folder / name).is_dir():
        raise ModelError(
            f"{path} does not hold the {name} ({entry[1]}), and there is no folder "
            f"{folder / name}: put it there in diffusers' layout",
            setting="model_parts_dir",
        )
    return load_part(name, entry, folder, dtype, None, allow_pickles)


def _network(
    where: str,
    class_name: str,
    config: Mapping[str, Any],
    own: dict[str, Tensor],
    dtype: torch.dtype,
    quantization: Any,
) -> Any:
    """Returns a part of diffusers from its tensors in the layout of the original code."""
    network_class = getattr(diffusers, class_name)
    mappings: Mapping[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
    convert = mappings[class_name]["checkpoint_mapping_fn"]
    before = _elements(own)
    converted = dict(guarded(where, convert, config=dict(config), checkpoint=dict(own)))
    with _without_memory():
        expected = network_class.from_config(dict(config)).state_dict()
    _check(where, own, before, converted, expected)
    options = {"quantization_config": quantization} if quantization else {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        return guarded(
            where,
            network_class.from_single_file,
            converted,
            config=folder,
            torch_dtype=dtype,
            local_files_only=True,
            **options,
        )


def _without_memory() -> AbstractContextManager[None]:
    """Creates networks whose parameters need no memory."""
    from accelerate import init_empty_weights  # The engine also runs without accelerate.

    context: AbstractContextManager[None] = init_empty_weights()
    return context


def _clip(
    where: str,
    class_name: str,
    config: Mapping[str, Any],
    own: dict[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
) -> Any:
    """Returns a CLIP text encoder from its tensors in the layout of the original code."""
    with _without_memory():
        encoder = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))
    expected = encoder.state_dict()
    # The last layer of the encoder of Stable Diffusion 2.x is not used.
    last = f"{prefix}transformer.resblocks.{config['num_hidden_layers']}."
    own = {key: it for key, it in own.items() if not key.startswith(last)}
    convert: Callable[..., Any] = convert_ldm_clip_checkpoint
    if prefix.endswith(".model."):
        converted = guarded(where, convert_open_clip_checkpoint, encoder, own, prefix=prefix)
    else:
        converted = guarded(where, convert, own, prefix)
    converted = {key: it for key, it in converted.items() if not HARMLESS_IN_CHECKPOINT.search(key)}
    if not hasattr(encoder, "text_model"):
        converted = {key.removeprefix("text_model."): it for key, it in converted.items()}
    if "text_projection.weight" not in expected:
        unused = converted.pop("text_projection.weight", None)
        own = {
            key: it for key, it in own.items() if it is not unused and "text_projection" not in key
        }
    _check(where, own, _elements(own), converted, expected)
    loaded = {key: it.to(dtype) for key, it in converted.items()}
    encoder.load_state_dict(loaded, assign=True)
    return encoder.eval()


def _elements(tensors: Mapping[str, Tensor]) -> int:
    return sum(it.numel() for key, it in tensors.items() if not HARMLESS_IN_CHECKPOINT.search(key))


def _check(
    where: str,
    own: Mapping[str, Tensor],
    elements: int,
    converted: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> None:
    """Checks that a conversion gave each parameter and used every tensor.

    The names differ before and after a conversion, but the number of elements does not.

    Raises:
        ModelError: A parameter is missing or has another size, or a tensor would be ignored.
    """
    info = {
        "missing_keys": expected.keys() - converted.keys(),
        "unexpected_keys": converted.keys() - expected.keys(),
        "mismatched_keys": [
            key
            for key in expected.keys() & converted.keys()
            if expected[key].shape != converted[key].shape
        ],
    }
    check_loaded(where, info)
    used = sum(it.numel() for it in converted.values())
    if used != elements:
        raise ModelError(
            f"{where} has tensors of {elements - used} elements that are of no layer of its "
            f"architecture and would be ignored; the first tensors are {first_names(own)}"
        )
