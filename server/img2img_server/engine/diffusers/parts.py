"""Loads the parts of a pipeline one by one, and checks that each is complete."""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal

import diffusers
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from img2img_server.default_dtype import DEFAULT_DTYPE
from img2img_server.domain.models import ModelKind
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.families.base import UNUSED_PARTS, Family
from img2img_server.engine.family import ModelError, ModelFiles, read_json
from img2img_server.engine.file_kinds import fault_of_content
from img2img_server.engine.tensor_names import HARMLESS_IN_PART, IGNORED, first_names
from img2img_server.engine.weight_files import check_folder, check_numbers, weights_of
from img2img_server.setting_files import MAX_BYTES

# Parameters that no forward of the engine uses, and buffers that are calculated.
_UNUSED: Final = re.compile(r"(^|\.)(position_ids|inv_freq)$|^lm_head\.")
# Rows of an embedding that no token of the tokenizer uses: the vocabulary of CLIP is not padded,
# others are padded for speed.
_UNUSED_ROWS: Final = 0.1
_PADDING: Final = 128
# Files of a tokenizer that hold its vocabulary.
_VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")

_PAIRS: Final = (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json"))

_AGAIN: Final = "fetch the files again, or check that they belong together"
# diffusers' sentence about a tensor that does not fit
_SIZES: Final = re.compile(
    r"(\S+) expected shape (?:torch\.Size\()?(\[[^]]*\])\)?, but got (?:torch\.Size\()?(\[[^]]*\])"
)

# The libraries change classes of torch while they create a model, for all threads.
_ONE_AT_A_TIME = threading.Lock()

_log = logging.getLogger(__name__)


def load_parts(
    family: Family,
    files: ModelFiles,
    folder: Path,
    dtype: torch.dtype,
    *,
    given: Mapping[str, Any],
    quantization: Any = None,
    allow_pickles: bool = False,
) -> dict[str, Any]:
    """Loads all parts of a model in diffusers' layout.

    Args:
        given: Parts that are loaded already.
        quantization: The configuration of the denoiser's quantisation; None: none.

    Returns:
        The arguments of the pipeline's from_pretrained: every part, or None for an absent one.

    Raises:
        ModelError: A part is missing, damaged, incomplete, or does not fit the others.
    """
    pipeline_class = getattr(diffusers, family.pipelines[files.class_name])
    expected, _ = pipeline_class._get_signature_keys(pipeline_class)
    found = family.parts(files)
    parts: dict[str, Any] = dict.fromkeys(files.absent_parts)
    parts |= dict.fromkeys(UNUSED_PARTS & set(expected))
    for name in sorted(set(expected) - parts.keys() - given.keys()):
        if name in found:
            config = quantization if name == family.denoiser else None
            parts[name] = load_part(name, found[name], folder, dtype, config, allow_pickles)
        elif name not in pipeline_class._optional_components:
            raise ModelError(
                f"model_index.json in {folder} names no {name}, which {files.class_name} needs: "
                "correct its entry, or fetch the file again"
            )
    parts |= given
    check_fit(family, parts, str(folder), "vae_dir" if "vae" in given else "model")
    return parts


def prove_parts(
    folder: Path, *, allow_pickles: bool = False, without: Collection[str] = ()
) -> None:
    """Loads each part of a model in the number format of its files, one after the other.

    No weights are kept, and they stay in their mapped files, so this needs little memory.

    Args:
        without: Parts that the folder does not have.

    Raises:
        ModelError: No family serves the model, or a part is missing, damaged or incomplete.
    """
    files = ModelFiles.read(folder)
    family = detect(files, str(folder))
    family.traits(files)
    family.check_parts(files)
    kept: dict[str, Any] = {}
    for name, entry in sorted(family.parts(files).items()):
        if name in without:
            continue
        part = load_part(name, entry, folder, "auto", None, allow_pickles)
        kept[name] = SimpleNamespace(config=part.config) if hasattr(part, "config") else part
        del part
    check_tokenizers(kept, str(folder))


def load_part(
    name: str,
    entry: tuple[str, str],
    folder: Path,
    dtype: torch.dtype | Literal["auto"],
    quantization: Any = None,
    allow_pickles: bool = False,
) -> Any:
    """Loads one part.

    Args:
        entry: The library and the class in model_index.json.
        folder: The model's folder.

    Raises:
        ModelError: The part is missing, damaged or incomplete.
    """
    part_class, own = part_class_of(name, entry), folder / name
    check_folder(own, entry[1])
    if not issubclass(part_class, torch.nn.Module):
        return guarded(own, part_class.from_pretrained, str(own), local_files_only=True)
    weights = weights_of(own, allow_pickles=allow_pickles)
    file = own / (weights.index or weights.files[0])
    if not (own / "config.json").is_file():
        raise ModelError(f"there is no {own / 'config.json'}: fetch the file again")
    if not quantization and not weights.is_pickle:
        for name, header in weights.headers.items():
            check_numbers(own / name, header)
    options: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    if issubclass(part_class, PreTrainedModel):
        options["dtype"] = dtype
    elif dtype != "auto":
        options["torch_dtype"] = dtype
    part, info = guarded(
        file,
        part_class.from_pretrained,
        str(own),
        variant=weights.variant or None,
        use_safetensors=not weights.is_pickle,
        output_loading_info=True,
        local_files_only=True,
        **options,
    )
    check_loaded(str(own), info, file)
    return part


def part_class_of(name: str, entry: tuple[str, str]) -> Any:
    """Returns the class of a part.

    Raises:
        ModelError: It is not one of diffusers or transformers.
    """
    library, class_name = entry
    if library in ("diffusers", "transformers"):
        module: Any = importlib.import_module(library)
    else:  # Some pipelines have classes of their own.
        module = getattr(diffusers.pipelines, library, None)
    found = getattr(module, class_name, None)
    if found is None:
        raise ModelError(
            f"model_index.json names {library}.{class_name} for {name}, which diffusers and "
            "transformers do not have. Code that comes with a model is not run: use a model "
            "without it"
        )
    return found


def check_loaded(place: str, info: Mapping[str, Any], file: Path | None = None) -> None:
    """Checks what a library reports of the tensors of a part.

    Args:
        place: The folder or file, for the sentence.
        file: The file with the weights, if `place` is a folder.

    Raises:
        ModelError: A parameter is not in the file, or the file has tensors that were not loaded.
    """
    missing = [key for key in info["missing_keys"] if not _UNUSED.search(key)]
    if missing:
        raise ModelError(
            f"{place} is incomplete: its weights lack {first_names(missing)}. Fetch "
            f"{file or 'the files'} again, or check that its config.json belongs to them"
        )
    unexpected = [key for key in info["unexpected_keys"] if not HARMLESS_IN_PART.search(key)]
    if unexpected:
        raise ModelError(
            f"{place} has weights that its config.json does not describe and that would be "
            f"ignored: {first_names(unexpected)}. Check that the files belong together"
        )
    if ignored := [key for key in info["unexpected_keys"] if HARMLESS_IN_PART.search(key)]:
        _log.info("%s: %s: %s", IGNORED, place, first_names(ignored))
    if info.get("mismatched_keys"):
        keys = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
        raise ModelError(
            f"{place} has weights of other sizes than its config.json: {first_names(keys)}"
        )


def check_fit(
    family: Family,
    parts: Mapping[str, Any],
    place: str,
    vae_setting: str = "model",
    text_setting: str = "model",
) -> None:
    """Checks that the parts of a model fit each other.

    Args:
        vae_setting: The setting that names the autoencoder.
        text_setting: The setting that names the text encoders.

    Raises:
        ModelError: One is that of another model.
    """
    check_tokenizers(parts, place)
    _check_latents(family, parts, place, vae_setting)
    _check_text_width(family, parts, place, text_setting)


def _check_latents(family: Family, parts: Mapping[str, Any], place: str, setting: str) -> None:
    """Raises ModelError if the autoencoder has other latents than the denoiser takes."""
    taken = _channels(parts.get(family.denoiser), "in_channels")
    given = _channels(parts.get("vae"), "latent_channels")
    if family.kind is ModelKind.DIFFUSION and taken and given and taken != given:
        is_own = setting == "model"
        cure = "fetch the folder vae of this model again" if is_own else "name that of this model"
        raise ModelError(
            f"the vae of {place} has latents of {given} channels, but its {family.denoiser} takes "
            f"{taken}: it is another family's: {cure}",
            setting,
        )


def _check_text_width(family: Family, parts: Mapping[str, Any], place: str, setting: str) -> None:
    """Raises ModelError if the text encoders give other numbers for a token than the UNet takes."""
    config = getattr(parts.get(family.denoiser), "config", {})
    taken = config.get("cross_attention_dim")
    encoders = [name for name in parts if name.startswith("text_encoder") and parts[name]]
    given = [int(getattr(parts[name].config, "hidden_size", 0) or 0) for name in encoders]
    is_plain = isinstance(taken, int) and not config.get("encoder_hid_dim")
    if (
        family.kind is ModelKind.DIFFUSION
        and is_plain
        and all(given)
        and sum(given) not in (0, taken)
    ):
        raise ModelError(
            f"the {' and '.join(encoders)} of {place} {'gives' if len(given) == 1 else 'give'} "
            f"{sum(given)} numbers for each token, but its {family.denoiser} takes {taken}: they "
            f"are of different models: {_AGAIN}",
            setting,
        )


def _channels(part: Any, name: str) -> int:
    return int(getattr(getattr(part, "config", None), name, 0) or 0)


def check_tokenizers(parts: Mapping[str, Any], place: str) -> None:
    """Checks that each tokenizer has the vocabulary of its text encoder.

    Raises:
        ModelError: A vocabulary is too small, too large, or ends prompts with another token.
    """
    for name, tokenizer in parts.items():
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        encoder_name = name.replace("tokenizer", "text_encoder")
        encoder = parts.get(encoder_name)
        config = getattr(encoder, "config", None)
        if config is None:
            continue
        text = config.get_text_config()
        size, rows = len(tokenizer), int(getattr(text, "vocab_size", 0) or 0)
        found = (Path(place) / name / it for it in _VOCABULARIES)
        where = f"the {name} of {place}"
        file = next((f" in {it}" for it in found if it.is_file()), "")
        is_clip = str(getattr(text, "model_type", "")).startswith("clip")
        unused = max(rows * _UNUSED_ROWS, 0 if is_clip else _PADDING)
        if rows and not rows - unused <= size <= rows:
            raise ModelError(
                f"{where} knows {size} tokens{file}, but its {encoder_name} has {rows}: it is "
                "another model's, or files are missing: fetch the files of this folder again"
            )
        # In older files, 2 stands for the token with the largest number.
        end = getattr(text, "eos_token_id", None)
        if is_clip and end not in (None, 2, tokenizer.eos_token_id):
            raise ModelError(
                f"{where} ends prompts with token {tokenizer.eos_token_id}, but its {encoder_name} "
                f"expects {end}: the files do not belong together"
            )
        longest = int(getattr(text, "max_position_embeddings", 0) or 0)
        if is_clip and longest and tokenizer.model_max_length > longest:
            tokenizer.model_max_length = longest


def guarded(place: Path | str, call: Any, *arguments: Any, **options: Any) -> Any:
    """Calls a library, which raises errors of any class for damaged files."""
    try:
        with _ONE_AT_A_TIME, DEFAULT_DTYPE.restored():
            return call(*arguments, **options)
    except Exception as error:
        _log.debug("part_not_loaded: %s", place, exc_info=error)
        folder = place if isinstance(place, Path) and place.is_dir() else Path(place).parent
        config = folder / "config.json"
        if folder == place or config.is_file():
            check_small_files(folder)
        raise ModelError(f"cannot load {place}: {_reason(error, config)}") from error


def check_small_files(folder: Path) -> None:
    """Looks for the file that is wrong, after a library could not load a folder.

    Raises:
        ModelError: A file is missing, is no JSON or is something else.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    for name in names:
        if name.endswith(".json"):
            if (folder / name).stat().st_size <= MAX_BYTES:
                read_json(folder / name)
        elif name.endswith((".txt", ".model")):
            with (folder / name).open("rb") as file:
                if fault := fault_of_content(file.read(256), "tokenizer's words"):
                    raise ModelError(f"{folder / name} {fault}")
    for one, other in _PAIRS:
        if one in names and other not in names and "tokenizer.json" not in names:
            raise ModelError(f"there is no {folder / other}, which belongs to {one}: {_AGAIN}")


def _reason(error: Exception, config: Path) -> str:
    """Returns why a library could not load a part, with the cure."""
    why = " ".join(str(error).split())
    if sizes := _SIZES.search(why):
        name, configured, found = sizes.groups()
        return (
            f"{name} has the size {found}, but {configured} by its config.json: they are of "
            f"different models: {_AGAIN}"
        )
    if "ignore_mismatched_sizes" in why:
        return f"its weights have other sizes than its config.json says: {_AGAIN}"
    if isinstance(error, ValueError) and "`" in why:  # diffusers quotes entries so.
        return f"an entry of {config} is wrong: {why[:400].rstrip('.')}: {_AGAIN}"
    if isinstance(error, KeyError | AttributeError | TypeError):  # A file lacks an entry.
        return f"a file in it is damaged ({type(error).__name__} {why}): {_AGAIN}"
    return f"{why[:400].rstrip('.') or type(error).__name__}: {_AGAIN}"
