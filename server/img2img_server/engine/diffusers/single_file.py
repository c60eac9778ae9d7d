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

from img2img_server.engine.checkpoint import VAE, Checkpoint, autoencoder, complete
from img2img_server.engine.checkpoint_file import with_full_names
from img2img_server.engine.checkpoint_text import (
    TEXT_ENCODERS,
    VAE_FACTORS,
    file_of,
    folder_of,
    inside,
    text_config,
)
from img2img_server.engine.diffusers.clip_tokenizer import clip_tokenizer
from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.diffusers.parts import (
    check_fit,
    check_loaded,
    guarded,
    load_part,
)
from img2img_server.engine.diffusers.scaled_weights import unscaled
from img2img_server.engine.family import ModelError, about_setting
from img2img_server.engine.tensor_names import (
    HARMLESS_IN_CHECKPOINT,
    HARMLESS_IN_PART,
    IGNORED,
    first_names,
)
from img2img_server.engine.weight_files import check_numbers, read_header

# T5 has one table of tokens under two names.
_TIED: Final = ("shared.weight", "encoder.embed_tokens.weight")
# Encoders whose shorter prompts are filled with the token of "!", as those of OpenCLIP.
_FILLED_WITH_ZERO: Final = "!"

_log = logging.getLogger(__name__)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by their full names, mapped from the file.

    A pickle must be allowed already; it is read without code.

    Raises:
        ModelError: The file cannot be read.
    """
    if path.suffix.lower() == ".safetensors":
        return with_full_names(guarded(path, load_file, str(path)), path)
    found = guarded(path, torch.load, str(path), map_location="cpu", weights_only=True, mmap=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    tensors = {name: it for name, it in found.items() if isinstance(it, Tensor)}
    if not tensors:
        raise ModelError(f"{path} has no tensors")
    return with_full_names(tensors, path)


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
            prefix, held = checkpoint.prefixes[name], checkpoint.held(tensors, name)
            own = unscaled(where, held, dtype)
            if entry[0] == "diffusers":
                quantiser = quantization if name == family.denoiser else None
                parts[name] = _network(where, entry[1], config, own, dtype, quantiser)
            elif prefix == inside(family.name, name):
                own = {key.removeprefix(prefix): it for key, it in own.items()}
                parts[name] = _text_encoder(where, entry[1], config, own, dtype)
            else:
                parts[name] = _clip(where, entry[1], config, own, prefix, dtype)
        elif config and name == "scheduler":
            parts[name] = getattr(diffusers, entry[1]).from_config(config)
        elif entry[1] == "CLIPTokenizer" and not _has(family, name, checkpoint, parts_dir):
            encoder = checkpoint.prefixes.get(name.replace("tokenizer", "text_encoder"), "")
            is_open = encoder.endswith(".model.") or (family.name, name) == ("sd3", "tokenizer_2")
            parts[name] = clip_tokenizer(_FILLED_WITH_ZERO if is_open else "")
        elif _is_left_out(family, name, checkpoint, parts_dir):
            _log.warning(
                "part_left_out: %s of %s: words beyond 77 tokens have no effect", name, path
            )
            parts[name] = None
        else:
            parts[name] = _from_folder(family, name, entry, path, parts_dir, dtype, allow_pickles)
    encoders = {name for name in entries if name.startswith("text_encoder")}
    vae, text = (
        "model" if names <= checkpoint.prefixes.keys() else "model_parts_dir"
        for names in ({"vae"}, encoders)
    )
    check_fit(family, parts, str(path), "vae_dir" if "vae" in given else vae, text)
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
    if is_held or parts_dir is None:
        return False
    return (folder_of(parts_dir, family.name) / tokenizer).is_dir()


def _is_left_out(family: Family, name: str, checkpoint: Checkpoint, parts_dir: Path | None) -> bool:
    """Returns whether a part is T5 of Stable Diffusion 3 or its tokenizer, which a model can do
    without, and T5 is neither in the file nor in the folder of parts.
    """
    encoder = "text_encoder_3"
    if family.name != "sd3" or name not in (encoder, "tokenizer_3"):
        return False
    if encoder in checkpoint.prefixes:
        return False
    return parts_dir is None or not (
        (folder_of(parts_dir, family.name) / encoder).is_dir()
        or file_of(parts_dir, family.name, encoder)
    )


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
            f"{_or_file(family, name)}"
            f"{_command(family, 'FOLDER')}"
        )
    folder = folder_of(parts_dir, family.name)
    with about_setting("model_parts_dir"):
        if (folder / name).is_dir():
            return load_part(name, entry, folder, dtype, None, allow_pickles)
        if file := file_of(parts_dir, family.name, name):
            return _from_file(family, name, entry[1], file, dtype)
    raise ModelError(
        f"{path} does not hold the {name} ({entry[1]}), and there is no folder "
        f"{folder / name}: put it there in diffusers' layout{_or_file(family, name)}"
        f"{_command(family, parts_dir)}",
        setting="model_parts_dir",
    )


def _command(family: Family, folder: Path | str) -> str:
    """Returns the end of a sentence with the command that fetches the parts of a family."""
    return f". To fetch all parts: img2img-server fetch-model --parts {family.name} {folder}"


def _or_file(family: Family, name: str) -> str:
    """Returns the end of a sentence with the single file that would do as well."""
    kind = "ae" if name == "vae" else TEXT_ENCODERS.get(family.name, {}).get(name)
    return f", or as the file {family.name}/{kind}.safetensors" if kind else ""


def _from_file(family: Family, name: str, class_name: str, file: Path, dtype: torch.dtype) -> Any:
    """Returns a text encoder or an autoencoder from a file of its own."""
    header = read_header(file)
    check_numbers(file, header)
    shapes = {key: entry.shape for key, entry in header.items()}
    where = f"the {name} in {file}"
    with complete(str(file)):
        if name == "vae":
            starts = (it for it in (VAE, "vae.") if f"{it}decoder.conv_in.weight" in shapes)
            prefix = next(starts, "")
            is_known = f"{prefix}decoder.conv_in.weight" in shapes
            factors = VAE_FACTORS[family.name]
            config = autoencoder(shapes, prefix, *factors) if is_known else None
        else:
            config = text_config(class_name, shapes, "")
    if config is not None:
        tensors = read_tensors(file)
        _log.info("part_from_file: %s: %s", name, file)
        if name == "vae":
            return _network(where, class_name, config, tensors, dtype, None)
        return _text_encoder(where, class_name, config, tensors, dtype)
    raise ModelError(
        f"{file} has the name of a {name} ({class_name}), but its tensors are others: "
        f"{first_names(shapes)}",
        setting="model_parts_dir",
    )


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
    # Names that the encoder does not have are known to be harmless here.
    loaded = {key: it.to(dtype) for key, it in converted.items() if key in expected}
    encoder.load_state_dict(loaded, assign=True)
    return encoder.eval()


def _text_encoder(
    where: str,
    class_name: str,
    config: Mapping[str, Any],
    own: dict[str, Tensor],
    dtype: torch.dtype,
) -> Any:
    """Returns a text encoder from its tensors, which have the names of transformers."""
    encoder_class = getattr(transformers, class_name)
    with _without_memory():
        encoder = encoder_class(encoder_class.config_class(**config))
    expected = encoder.state_dict()
    tensors = unscaled(where, own, dtype)
    for start in ("text_model.", "model."):
        if not any(key.startswith(start) for key in expected):
            tensors = {key.removeprefix(start): it for key, it in tensors.items()}
    for one, other in (_TIED, _TIED[::-1]):
        if one in expected and one not in tensors and other in tensors:
            tensors[one] = tensors[other]
    converted = {key: it for key, it in tensors.items() if not HARMLESS_IN_PART.search(key)}
    projection = "text_projection.weight"
    if projection in expected and projection in tensors:
        converted[projection] = tensors[projection]
    _check(where, own, _elements(converted), converted, expected)
    encoder.load_state_dict({key: it.to(dtype) for key, it in converted.items()}, assign=True)
    encoder.tie_weights()
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
            f"architecture and would be ignored; the first tensors are {first_names(own)}. "
            "Use a file without them"
        )
