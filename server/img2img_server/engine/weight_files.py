"""Finds the weight files of a model and checks them before they are loaded. Imports no torch."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from img2img_server.engine.family import ModelAccessError, ModelError, access_cure, read_json
from img2img_server.engine.file_kinds import AGAIN, fault_of_content, other_formats
from img2img_server.engine.tensor_names import first_names

# Names of weight files in the layouts of diffusers and of transformers. A variant, which names a
# precision, is written before or after the number of a shard.
_FILE: Final = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<early>\w+?))?(?:-\d{5}-of-(?P<count>\d{5}))?(?:\.(?P<late>\w+))?"
    r"\.(?P<form>safetensors|bin)"
)
_INDEX: Final = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"\.(?P<form>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json"
)
# The first of these variants that exists is loaded. Other variants come after them by name.
_VARIANTS: Final = ("", "fp32", "fp16", "bf16")
_LAST_VARIANTS: Final = ("ema", "non_ema")
# Tensors that an index may list although they are copies of others, or calculated.
_SHARED: Final = re.compile(r"(^|\.)(embed_tokens|shared|lm_head|position_ids)(\.|$)")
# Number formats of weights that are quantised.
_WHOLE: Final = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors library
PICKLES: Final = (".ckpt", ".bin", ".pt", ".pth")
# zip, gzip, xz, 7z, rar and zstd
_ARCHIVES: Final = (
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"\xfd7zXZ",
    b"7z\xbc\xaf",
    b"Rar!",
    b"\x28\xb5\x2f\xfd",
)


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The files that together are the weights of one part of a model.

    Attributes:
        files: Names in the folder of the part.
        variant: The part of the names that says the precision; often empty.
        index: The name of the file that lists shards; empty without shards.
        shard_count: How many shards there must be; 0 without shards.
        headers: The tensors of each file, if `weights_of` has read them.
    """

    files: tuple[str, ...]
    variant: str
    is_pickle: bool
    index: str = ""
    shard_count: int = 0
    headers: Mapping[str, Mapping[str, TensorEntry]] = field(default_factory=dict, compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether no shard is missing."""
        return not self.shard_count or (len(self.files) == self.shard_count and bool(self.index))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


def choose_weights(names: Collection[str], variant: str | None = None) -> WeightSet | None:
    """Returns the weight files to load from the names in a folder; None if it has none.

    Files without pickles come first, then the full precision, and complete sets before others.

    Args:
        variant: The only variant that may be chosen; None: the best one.
    """
    indexes = {}
    for name in names:
        if match := _INDEX.fullmatch(name):
            indexes[match["stem"], match["form"], match["variant"] or ""] = name
    found: dict[tuple[str, str, str, int], list[str]] = {}
    for name in sorted(names):
        if match := _FILE.fullmatch(name):
            own = match["early"] or match["late"] or ""
            if variant is None or own == variant:
                key = match["stem"], match["form"], own, int(match["count"] or 0)
                found.setdefault(key, []).append(name)
    sets = [
        WeightSet(
            tuple(files),
            own,
            form == "bin",
            indexes.get((stem, form, own), "") if count else "",
            count,
        )
        for (stem, form, own, count), files in found.items()
    ]
    # The libraries prefer shards if there are both.
    return min(
        sets,
        key=lambda it: (it.is_pickle, not it.is_whole, _rank(it.variant), not it.shard_count),
        default=None,
    )


def _rank(variant: str) -> tuple[int, str]:
    if variant in _VARIANTS:
        return _VARIANTS.index(variant), ""
    return len(_VARIANTS) + (
        1 + _LAST_VARIANTS.index(variant) if variant in _LAST_VARIANTS else 0
    ), variant


def weights_of(folder: Path, *, allow_pickles: bool = False) -> WeightSet:
    """Returns the weight files of a part's folder, after a check of their headers and sizes.

    Raises:
        ModelError: A file is missing, cut off or of another kind.
    """
    check_folder(folder, "it")
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise ModelAccessError(
            f"{folder} cannot be read: {error.strerror}{access_cure(error)}"
        ) from error
    chosen = choose_weights(names)
    if chosen is None:
        raise ModelError(f"{folder} has no weights{_other_weights(folder, names)}")
    if chosen.is_pickle:
        refuse_pickle(folder / chosen.files[0], allow_pickles)
    listed = _listed_tensors(folder, chosen) if chosen.shard_count else {}
    if chosen.is_pickle:
        for name in chosen.files:
            _check_kind(folder / name, _head(folder / name))
        return chosen
    headers = {name: read_header(folder / name) for name in chosen.files}
    _check_held(folder, chosen, listed, {key for header in headers.values() for key in header})
    return replace(chosen, headers=headers)


def check_numbers(path: Path, header: Mapping[str, TensorEntry]) -> None:
    """Raises ModelError for weights that are whole numbers, which another library has quantised.

    Args:
        header: The tensors of the file.
    """
    for name, tensor in header.items():
        if name.endswith(".weight") and tensor.dtype in _WHOLE:
            raise ModelError(
                f"{path} has weights that are integers ({name}: {tensor.dtype}), so it was "
                "quantised: use the model in fp16, bf16 or fp32, and IMG2IMG_QUANTIZATION for 8 "
                "bits in memory"
            )


def check_folder(folder: Path, needed_by: str) -> None:
    """Raises ModelError if the folder of a part is missing."""
    if folder.is_dir():
        return
    reason, again = f"the model has no folder {folder}, which {needed_by} needs", "fetch its files"
    if folder.is_symlink():
        raise ModelError(f"{reason}: it is a link without a target: correct the link, or {again}")
    if folder.exists():
        raise ModelError(f"{reason}: it is a file instead of a folder: remove it, and {again}")
    try:
        names = [path.name for path in folder.parent.iterdir()]
    except OSError:
        names = []
    for name in names:
        if name.lower() == folder.name.lower():
            raise ModelError(f"{reason}: rename the folder {name} to {folder.name}")
    raise ModelError(f"{reason}: {again} again")


def _other_weights(folder: Path, names: Collection[str]) -> str:
    """Returns the end of a sentence about a folder without weights: what it has instead."""
    others = sorted(name for name in names if name.endswith((".safetensors", *PICKLES)))
    if hint := other_formats(folder, [name for name in names if name not in others]):
        return f" that are read: {hint}"
    if others:
        return (
            f", only {', '.join(others)}, whose names are not known: rename the file to "
            "diffusion_pytorch_model.safetensors or, for a text encoder, model.safetensors, or "
            "fetch the files of this folder again"
        )
    if (folder / folder.name).is_dir():
        return f": move the files of {folder / folder.name} one folder up"
    return ": fetch the files of this folder again"


def is_pickle(path: Path) -> bool:
    """Returns whether a file is a pickle by its name."""
    return path.suffix.lower() in PICKLES


def refuse_pickle(path: Path, is_allowed: bool) -> None:
    """Raises ModelAccessError for a pickle unless the operator allows pickles."""
    if not is_allowed:
        raise ModelAccessError(
            f"{path} is a pickle, which can run code when it is read: use a .safetensors file, or "
            "set IMG2IMG_ALLOW_PICKLES if you trust where it comes from"
        )


def _listed_tensors(folder: Path, chosen: WeightSet) -> Mapping[str, str]:
    """Returns the shard of each tensor by the index, after a check that the shards are there."""
    if not chosen.index:
        raise ModelError(
            f"{folder} has shards but no index of them, {_index_name(chosen)}: {AGAIN}"
        )
    listed = read_json(folder / chosen.index).get("weight_map")
    if not isinstance(listed, dict):
        raise ModelError(f"{folder / chosen.index} has no weight_map: {AGAIN}")
    missing = sorted(name for name in set(listed.values()) if not (folder / str(name)).is_file())
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(map(str, missing))}, which {chosen.index} lists: {AGAIN}"
        )
    return listed


def _check_held(
    folder: Path, chosen: WeightSet, listed: Mapping[str, str], held: Collection[str]
) -> None:
    """Raises ModelError if a listed tensor is in no shard."""
    gone = [key for key in listed if key not in held and not _SHARED.search(key)]
    for name in chosen.files:
        if own := [key for key in gone if listed[key] == name]:
            raise ModelError(
                f"{folder / name} lacks {first_names(own)}, which {chosen.index} lists in it: "
                f"it is of another download: {AGAIN}"
            )


def _index_name(chosen: WeightSet) -> str:
    stem, _, _ = chosen.files[0].partition("-")
    form = "bin" if chosen.is_pickle else "safetensors"
    variant = f".{chosen.variant}" if chosen.variant else ""
    return f"{stem.removesuffix(variant)}.{form}.index{variant}.json"


def read_header(path: Path) -> Mapping[str, TensorEntry]:
    """Returns the tensors of a safetensors file by name, from its header.

    Raises:
        ModelError: The file cannot be read, is of another kind, or does not have all its bytes.
    """
    head = _head(path)
    _check_kind(path, head)
    length = int.from_bytes(head[:8], "little")
    size = path.stat().st_size
    if len(head) < 8 or length > _MAX_HEADER_BYTES or head[8:9] not in (b"{", b""):
        raise ModelError(f"{path} is not a safetensors file: {AGAIN}")
    if 8 + length > size:
        raise ModelError(f"{path} is cut off in its header, after {size} bytes: {AGAIN}")
    try:
        with path.open("rb") as file:
            file.seek(8)
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        found = {
            name: TensorEntry(str(entry["dtype"]), tuple(entry["shape"]))
            for name, entry in entries.items()
        }
    except OSError as error:
        raise ModelAccessError(
            f"{path} cannot be read: {error.strerror}{access_cure(error)}"
        ) from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} is not a safetensors file: its header is damaged: {AGAIN}"
        ) from error
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        how = "is cut off" if size < whole else "has bytes after its end"
        raise ModelError(f"{path} {how}: it has {size} bytes instead of {whole}: {AGAIN}")
    if not found:
        raise ModelError(f"{path} has no tensors: {AGAIN}")
    return found


def read_metadata(path: Path) -> Mapping[str, str]:
    """Returns the metadata of a safetensors file that `read_header` accepts."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length)).get("__metadata__")
    return found if isinstance(found, dict) else {}


def check_kind(path: Path) -> None:
    """Raises ModelError for a file that is no weights by its first bytes, such as a web page."""
    _check_kind(path, _head(path))


def _head(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelError(f"{path} is a folder instead of a file: remove it, and {AGAIN}")
        if not stat.S_ISREG(mode):  # Opening a pipe may wait for ever.
            raise ModelError(
                f"{path} is a pipe, a socket or a device, not a file: remove it, and {AGAIN}"
            )
        with path.open("rb") as file:
            return file.read(256)
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise ModelError(
                f"{path} is a link to {path.readlink()}, which cannot be read "
                f"({error.strerror}): correct the link, or {AGAIN}"
            ) from error
        raise ModelAccessError(
            f"{path} cannot be read: {error.strerror}{access_cure(error)}"
        ) from error


def _check_kind(path: Path, head: bytes) -> None:
    """Raises ModelError for a file that is something else than weights."""
    if fault := fault_of_content(head, "weights"):
        raise ModelError(f"{path} {fault}")
    is_archive = head.startswith(_ARCHIVES)
    # torch writes pickles into a zip archive.
    has_pickle = head.startswith(b"\x80\x02") or (is_archive and b"data.pkl" in head)
    if path.suffix.lower() == ".safetensors" and has_pickle:
        raise ModelError(
            f"{path} is a pickle with the name of a safetensors file: use a .safetensors file"
        )
    if is_archive and not has_pickle:
        raise ModelError(f"{path} is an archive: unpack it, and name the model that it holds")
