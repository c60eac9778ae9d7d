"""Reads the catalogue: the models that one worker serves, from IMG2IMG_MODELS_FILE.

    [[models]]                            # the first one is loaded when the worker starts
    name = "photo"                        # default: the folder's or file's name, or the hub id
    source = "/models/photo.safetensors"  # as IMG2IMG_MODEL; default: the model inside the package
    lora_dir = "/models/photo-loras"      # as IMG2IMG_LORA_DIR; also embeddings_dir, vae_dir
    lora_s3_prefix = "loras/photo"        # as IMG2IMG_LORA_S3_PREFIX; without lora_dir, the copies
                                          # are in a folder of this name below IMG2IMG_LORA_DIR
    base = "/models/sdxl"                 # has what the file does not hold: a model's folder, or
                                          # one as IMG2IMG_MODEL_PARTS_DIR

    [models.defaults]                     # default of each: the setting IMG2IMG_DEFAULT_…
    scheduler = "dpmpp_2m"
    num_inference_steps = 25
    guidance_scale = 6.0
    strength = 0.6
    native_size = 512                     # as IMG2IMG_NATIVE_SIZE

    [[models]]
    name = "acme/fast"
    source = "acme/fast@v2"
    dtype = "float16"                     # these settings can differ by model, too:
    max_batch_size = 4                    # dtype, max_batch_size, warm_up_sizes, quantization,
    quantization = "int8"                 # gguf_file, tiny_vae, compile, text_encoder_placement

A file whose name ends with .json has the same content as JSON: {"models": [{"name": …}, …]}.
Every other setting applies to all models.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from img2img_server.domain.hub_id import HubId
from img2img_server.domain.params import MAX_SIDE_PIXELS
from img2img_server.engine.family import ModelError
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.setting_files import read_text
from img2img_server.setting_names import Origin, in_words_of_settings, variable
from img2img_server.setting_syntax import KeyPrefix, OptionalPath, Sizes
from img2img_server.settings import Settings, SettingsError

_SETTING: Final = "models_file"
# The settings of the fields that have other names.
_SETTINGS: Final = {"source": "model", "name": "model_name", "base": "model_parts_dir"}
# Paths of an entry, which are relative to the folder of the catalogue.
_PATHS: Final = ("model_parts_dir", "lora_dir", "vae_dir", "embeddings_dir", "gguf_file")

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]*$")
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class _Defaults(_Part):
    scheduler: str | None = None
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, le=30, allow_inf_nan=False)
    strength: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    native_size: int | None = Field(default=None, ge=1, le=MAX_SIDE_PIXELS)


class _Entry(_Part):
    """One model of the file. None: the value of the setting of the same name."""

    name: Name | None = None
    source: str = ""
    base: OptionalPath = None
    defaults: _Defaults = _Defaults()
    lora_dir: OptionalPath = None
    lora_s3_prefix: KeyPrefix | None = None
    embeddings_dir: OptionalPath = None
    vae_dir: OptionalPath = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None
    max_batch_size: int | None = Field(default=None, ge=1, le=256)
    warm_up_sizes: Sizes | None = None
    quantization: Literal["off", "int8", "fp8"] | None = None
    gguf_file: OptionalPath = None
    tiny_vae: str | None = None
    compile: Literal["off", "regional", "whole"] | None = None
    text_encoder_placement: Literal["device", "offload", "cpu"] | None = None


class _Catalogue(_Part):
    models: tuple[_Entry, ...]

    @field_validator("models")
    @classmethod
    def _has_one(cls, models: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
        if not models:
            raise ValueError("there is no model")
        return models


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model of the catalogue: its name, and the settings of a worker that serves only it."""

    name: str
    settings: Settings


def read_catalogue(settings: Settings) -> tuple[CatalogueModel, ...]:
    """Returns the models of the catalogue, in the order of the file. Reads no model.

    Args:
        settings: `models_file` is set.

    Raises:
        SettingsError: The file cannot be read, or an entry is wrong. Lists all mistakes.
    """
    path = settings.models_file
    assert path is not None
    entries = _read(path).models
    mistakes: list[str] = []
    found = []
    for entry in entries:
        model = _with_entry(settings, entry, path)
        found.append(model)
        mistakes += map(model.settings.origin.explain, model.settings.conflicts())
    for name, count in Counter(model.name for model in found).items():
        if count > 1:
            mistakes.append(
                f"{variable(_SETTING)}: {path}: {count} models have the name {name!r}: give each "
                "a `name` of its own"
            )
    mistakes += _shared_folders(settings, found)
    if mistakes:
        raise SettingsError(*dict.fromkeys(mistakes))
    return tuple(found)


def _shared_folders(settings: Settings, models: Sequence[CatalogueModel]) -> list[str]:
    """Returns a sentence for each folder that would have the files of two prefixes: each prefix
    deletes the copies that it does not have.
    """
    owners: dict[Path, tuple[str, str]] = {}
    mistakes = []
    for own in (settings, *(model.settings for model in models)):
        if own.lora_dir is None or not own.lora_s3_prefix:
            continue
        folder, prefix = own.lora_dir.resolve(), own.lora_s3_prefix.rstrip("/")
        owner = own.origin.entry or variable("lora_s3_prefix")
        other, others = owners.setdefault(folder, (owner, prefix))
        if others != prefix:
            fault = f"{own.lora_dir} has the files of {others} ({other}): name another folder"
            mistakes.append(own.origin.explain(f"{variable('lora_dir')}: {fault}"))
    return mistakes


def _read(path: Path) -> _Catalogue:
    try:
        text = read_text(path)
    except OSError as error:
        if path.is_dir():
            fault = "is a folder: name the file of the catalogue"
        elif path.is_file():
            fault = f"cannot be read: {error.strerror or error}: save it as text in UTF-8"
        else:
            fault = f"cannot be read: {error.strerror or error}: correct the path"
        raise _mistake(path, fault) from error
    try:
        content: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        form = "JSON" if path.suffix == ".json" else "TOML"
        cure = "correct this place"
        if path.suffix not in (".json", ".toml"):
            cure += ", or write a file with the suffix .toml or .json"
        raise _mistake(path, f"is no {form}: {error}: {cure}") from error
    try:
        return _Catalogue.model_validate(content)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False)
        raise SettingsError(
            *(_fault(path, content, fault["loc"], _sentence(fault)) for fault in faults)
        ) from error


def _mistake(path: Path, fault: str) -> SettingsError:
    return SettingsError(f"{variable(_SETTING)}: {path} {fault}")


def _fault(path: Path, content: Any, place: tuple[int | str, ...], fault: str) -> str:
    """Returns a sentence for an error of pydantic that names the entry and its field."""
    if len(place) < 2 or not isinstance(place[1], int):
        return f"{variable(_SETTING)}: {path} must have [[models]] with at least one model: add one"
    entry = content["models"][place[1]]
    name = entry.get("name", "") if isinstance(entry, dict) else ""
    where = f"{path}: entry {name or place[1] + 1}"
    # A union adds the kind that was tried, which says nothing to the operator.
    fields = [str(part) for part in place[2:] if part not in ("constrained-str",)]
    return f"{where}: {'.'.join(fields)}: {fault}" if fields else f"{where}: {fault}"


def _sentence(fault: ErrorDetails) -> str:
    """Returns an error of pydantic in the words of the errors of settings."""
    if fault["type"] == "extra_forbidden":
        model = _Defaults if "defaults" in fault["loc"] else _Entry
        return f"there is no such field; there are {', '.join(model.model_fields)}: correct it"
    message = in_words_of_settings(fault["msg"])
    return message.removeprefix("Value error, ").partition(", unable to")[0]


def _fields() -> dict[str, str]:
    """Returns the fields of an entry by their settings."""
    fields = {_SETTINGS.get(name, name): name for name in _Entry.model_fields if name != "defaults"}
    for name in _Defaults.model_fields:
        fields[name if name == "native_size" else f"default_{name}"] = f"defaults.{name}"
    return fields


_FIELDS: Final = _fields()


def _with_entry(settings: Settings, entry: _Entry, path: Path) -> CatalogueModel:
    folder = path.absolute().parent
    dumped = entry.model_dump(exclude={"defaults"}) | {
        f"defaults.{name}": value for name, value in entry.defaults.model_dump().items()
    }
    changes: dict[str, Any] = {
        setting: dumped[field] for setting, field in _FIELDS.items() if dumped[field] is not None
    }
    changes |= {name: folder / changes[name] for name in _PATHS if name in changes}
    changes["model"] = _source(entry.source, folder)
    changes["model_name"] = entry.name or _name_of(changes["model"])
    changes["models_file"] = None
    prefix = changes.get("lora_s3_prefix")
    if prefix and "lora_dir" not in changes and settings.lora_dir is not None:
        changes["lora_dir"] = settings.lora_dir / prefix
    elif "lora_dir" in changes:  # The files of the worker's own prefix are not for this folder.
        changes.setdefault("lora_s3_prefix", "")
    # A value that the operator has set for all models is named as such.
    shared = settings.model_fields_set - changes.keys()
    own_fields = {setting: field for setting, field in _FIELDS.items() if setting not in shared}
    origin = Origin(f"{path}: entry {changes['model_name']}", own_fields)
    return CatalogueModel(changes["model_name"], settings.of_entry(origin, changes))


def _source(source: str, folder: Path) -> str:
    """Returns the source with a path that is relative to the folder of the catalogue."""
    if source and (HubId.parse(source) is None or (folder / source).exists()):
        return str(folder / source)
    return source


def _name_of(source: str) -> str:
    """Returns the name of a model whose entry has none. Reads only the model's small files."""
    if not Path(source).exists() and (hub_id := HubId.parse(source)):
        return hub_id.repo
    try:
        return read_model_spec(source).name
    except (ModelError, OSError, ValueError):  # The model cannot be served; the worker says why.
        return Path(source).stem
