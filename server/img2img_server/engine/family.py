"""Facts about a model family before a model is loaded. Imports no torch.

A family is the architecture that a model directory holds: Stable Diffusion, SDXL, FLUX.1 and so on.
Each family is one module of engine/diffusers/families. The step loop, the scheduler
and the memory model do not know families: they see ModelSpec and Denoiser.
"""

from __future__ import annotations

import codecs
import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from img2img_server.domain.models import Guidance, ModelKind
from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.file_kinds import fault_of_content
from img2img_server.engine.model_names import ModelName
from img2img_server.errors import OperatorError
from img2img_server.setting_files import read_bytes, read_text
from img2img_server.setting_names import variable

# The file of a model in diffusers' layout that names its parts.
INDEX: Final = "model_index.json"
# The operator's file about a model in diffusers' layout.
TOML: Final = "img2img.toml"


class ModelError(OperatorError):
    """The model cannot be used; the sentence says why.

    Attributes:
        setting: The setting to change, when it is not the model itself.
    """

    def __init__(self, sentence: str, setting: str = "model") -> None:
        super().__init__(sentence)
        self.setting = setting

    @property
    def mistake(self) -> str:
        """The sentence, preceded by the name of the setting."""
        return f"{variable(self.setting)}: {self}"


@contextmanager
def about_setting(name: str) -> Iterator[None]:
    """Makes errors of the body about this setting instead of the model: of files that are damaged
    or cannot be read.
    """
    try:
        yield
    except ModelError as error:
        if error.setting != "model":
            raise
        raise ModelError(str(error), name) from error
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}", name) from error


class ModelAccessError(ModelError):
    """A file of the model must not or cannot be read, but may be complete."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The JSON files of a model: model_index.json and the configuration of each part.

    Attributes:
        names: The paths, hub id and other names of the model itself, the most exact one first.
    """

    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path, source: str = "") -> ModelFiles:
        """Reads the files of a directory in diffusers' layout.

        Args:
            source: The hub id from which they were downloaded; empty: none.

        Raises:
            ModelError: One of the files cannot be read.
        """
        index = read_json(folder / INDEX)
        configs = {}
        for name in index:
            for file in ("config.json", "scheduler_config.json"):
                if (folder / name / file).is_file():
                    configs[name] = read_json(folder / name / file)
        for name in ("scheduler", "unet"):  # the file may exist although the index does not list it
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            configs.setdefault(name, read_json(folder / name / file))
        places = (source,) if source else (str(folder.absolute()), str(folder.resolve()))
        return cls(index, configs, (*places, toml_entry(folder / TOML, "name")))

    def named(self, model_name: str = "", gguf_file: Path | None = None) -> ModelFiles:
        """Returns the files with the names that the operator's settings add.

        Args:
            model_name: The name of the model in requests, for example in the catalogue.
            gguf_file: The file of the denoiser's weights, which replaces that of the model.
        """
        weights = (str(gguf_file),) if gguf_file else ()
        return replace(self, names=(*weights, *self.names, model_name))

    @classmethod
    def of_pipeline(cls, pipeline: Any) -> ModelFiles:
        """Returns the contents that the files of a loaded pipeline would have."""
        parts = pipeline.components.items()
        configs = {name: part.config for name, part in parts if hasattr(part, "config")}
        for name, config in configs.items():
            if not isinstance(config, Mapping):  # transformers has objects instead of dictionaries
                configs[name] = config.to_dict()
        return cls({**pipeline.config, "_class_name": type(pipeline).__name__}, configs)

    @property
    def class_name(self) -> str:
        """The pipeline class of diffusers that the model names."""
        return str(self.index.get("_class_name", ""))

    @property
    def absent_parts(self) -> tuple[str, ...]:
        """Returns the parts of the pipeline that the model lacks, for example T5 in SD3."""
        return tuple(name for name, entry in self.index.items() if entry == [None, None])

    @property
    def parts(self) -> Mapping[str, tuple[str, str]]:
        """The parts that the model has, with the library and the class of each."""
        return {
            name: (str(entry[0]), str(entry[1]))
            for name, entry in self.index.items()
            if isinstance(entry, list) and len(entry) == 2 and None not in entry
        }

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The configuration of the model's own scheduler."""
        return self.config("scheduler")

    @property
    def known_names(self) -> tuple[ModelName, ...]:
        """The names of the model, then those of the models from which it was derived.

        Only the origin of the denoiser counts, not that of a text encoder or autoencoder.
        """
        origins = [self.index, self.config("unet"), self.config("transformer")]
        names = [*self.names, *(config.get("_name_or_path") for config in origins)]
        return tuple(ModelName.of(name) for name in names if name and isinstance(name, str))

    def config(self, part: str) -> Mapping[str, Any]:
        """Returns the configuration of a part of the pipeline; empty if there is none."""
        return self.configs.get(part, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTraits:
    """The traits of one model, which its family reads from the JSON files.

    Attributes:
        scheduler: The service's name of the model's own scheduler.
        schedulers: The names of all schedulers of the family.
        scheduler_max_steps: Schedulers with a lower limit of steps than the model's.
        native_size: The side of the images that the model was trained for.
        side_multiple: The divisor of width and height.
        min_side, max_side: The limits of width and height, in addition to those of the service.
    """

    family: str
    kind: ModelKind
    strength_rule: StrengthRule
    guidance: Guidance
    takes_negative_prompt: bool
    takes_prompt_weights: bool = False
    max_clip_skip: int = 0
    scheduler: str
    schedulers: tuple[str, ...]
    scheduler_max_steps: tuple[tuple[str, int], ...] = ()
    native_size: int
    side_multiple: int
    min_side: int = 0
    max_side: int = 1024
    num_inference_steps: int = 20
    guidance_scale: float = 7.5


class ModelFamily(Protocol):
    """A family as ModelSpec sees it."""

    @property
    def name(self) -> str:
        """Its name in ModelInfo, for example "sdxl"."""
        ...

    def offered(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the schedulers that a model can run with.

        Args:
            config: The configuration of the model's own scheduler.
        """
        ...

    def traits(self, files: ModelFiles, scheduler: str = "") -> ModelTraits:
        """Returns the traits of a model of this family from its files.

        Args:
            scheduler: The default scheduler that the operator chose; empty for the model's own.

        Raises:
            ModelError: The model is of the family, but cannot be served.
        """
        ...


def access_cure(error: OSError) -> str:
    """Returns the end of a sentence about a file that must not be read, or ""."""
    return ": correct its permissions" if isinstance(error, PermissionError) else ""


def toml_entry(path: Path, name: str) -> str:
    """Returns an entry of the operator's file about a model, or "". `read_model_spec` reports the
    mistakes of the file.
    """
    try:
        return str(tomllib.loads(read_text(path)).get(name, ""))
    except (OSError, ValueError):
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an absent file is an empty one.

    Raises:
        ModelError: The file cannot be read or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except OSError as error:
        is_damaged = isinstance(error.__cause__, UnicodeDecodeError)
        kind = ModelError if is_damaged else ModelAccessError
        cure = ": fetch the file again, or save it as UTF-8" if is_damaged else access_cure(error)
        raise kind(f"{path} cannot be read: {error.strerror}{cure}") from error
    except ValueError as error:
        fault = fault_of_content(read_bytes(path)[:256], "configuration")
        if not fault:
            fault = f"is no JSON: {error}: correct this place, or fetch the file again"
        raise ModelError(f"{path} {fault}") from error
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise ModelError(
                f"{path} begins with a byte order mark, which diffusers does not read: save it as "
                "UTF-8 without it"
            )
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no JSON object: fetch the file again")
    return found
