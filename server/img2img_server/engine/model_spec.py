"""What a model directory says about itself. See docs of diffusers for the directory's layout.

Beside diffusers' own files it may hold an `img2img.toml`; every entry has a default:

    name = "atelier"                  # default: the directory's name
    family = "sd"                     # default: by the pipeline class of model_index.json
    description = "Restyles photos."  # for who reads the file

    [defaults]
    scheduler = "ddim"                # default: by scheduler/scheduler_config.json
    num_inference_steps = 20
    guidance_scale = 7.5
    strength = 0.7

    [limits]
    max_num_inference_steps = 100

    [sizes]
    native = 512                      # default: unet/config.json's sample_size x 8
    multiple = 8
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from img2img_server.domain.models import SCHEDULER_OF_CLASS, ModelInfo
from img2img_server.domain.params import DEFAULT_STRENGTH
from img2img_server.errors import OperatorError
from img2img_server.setting_files import read_text
from img2img_server.settings import variable

SCHEDULERS = ("ddim", "euler", "euler_a", "lcm", "dpmpp_2m")
DEFAULT_MODEL = "atelier"

_LCM_STEPS = 50  # of the schedule that LCM picks its steps from, the default of diffusers
# Schedulers that we do not offer are answered by the nearest deterministic one.
_FALLBACK_SCHEDULER = "ddim"


class ModelError(OperatorError):
    """The model cannot be used; the sentence says why.

    `setting`: the one to change, when it is not the model itself.
    """

    def __init__(self, sentence: str, setting: str = "model") -> None:
        super().__init__(sentence)
        self.setting = setting

    @property
    def mistake(self) -> str:
        """The sentence with its setting in front."""
        return f"{variable(self.setting)}: {self}"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Defaults(_Part):
    scheduler: str = ""
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=7.5, ge=0)
    strength: float = Field(default=DEFAULT_STRENGTH, ge=0, le=1)


class _Limits(_Part):
    max_num_inference_steps: int = Field(default=100, ge=1, le=1000)


class _Sizes(_Part):
    native: int = Field(default=0, ge=0)
    multiple: int = Field(default=8, ge=1)


class _File(_Part):
    """The format of img2img.toml."""

    name: str = ""
    family: str = ""
    description: str = ""  # for who reads the file
    defaults: _Defaults = _Defaults()
    limits: _Limits = _Limits()
    sizes: _Sizes = _Sizes()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model and its defaults. `source`: what from_pretrained takes, a directory or a hub id."""

    source: str
    name: str
    family: str = "sd"
    scheduler: str = "ddim"
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    strength: float = DEFAULT_STRENGTH
    max_num_inference_steps: int = 100
    native_size: int = 512
    multiple: int = 8
    takes_negative_prompt: bool = True
    lcm_max_steps: int = _LCM_STEPS
    loras: tuple[str, ...] = ()

    @property
    def info(self) -> ModelInfo:
        """What callers are told."""
        others = tuple(name for name in SCHEDULERS if name != self.scheduler)
        return ModelInfo(
            name=self.name,
            family=self.family,
            schedulers=(self.scheduler, *others),
            default_num_inference_steps=self.num_inference_steps,
            default_guidance_scale=self.guidance_scale,
            default_strength=self.strength,
            native_size=self.native_size,
            max_num_inference_steps=self.max_num_inference_steps,
            side_multiple=self.multiple,
            scheduler_max_steps=(("lcm", self.lcm_max_steps),),
            takes_negative_prompt=self.takes_negative_prompt,
            loras=self.loras,
        )

    def refusal(self, height: int, width: int, num_inference_steps: int) -> str:
        """Why the model cannot do this, a sentence; empty when it can.

        The api has checked it with what the model announced, which may have changed since.
        """
        if num_inference_steps > self.max_num_inference_steps:
            return f"{self.name} runs at most {self.max_num_inference_steps} steps"
        if height % self.multiple or width % self.multiple:
            return f"{self.name} needs sides divisible by {self.multiple}"
        return ""


def packaged_model() -> Path:
    """Where the model inside the package is."""
    return Path(str(resources.files("img2img_server"))) / "models" / DEFAULT_MODEL


def read_model_spec(source: str) -> ModelSpec:
    """Reads a model directory; an empty source is the model inside the package.

    A source that is no directory is taken for a hub id with nothing known but its name.

    Raises:
        ModelError: the directory is not one of diffusers', or its img2img.toml is wrong.
    """
    folder = Path(source) if source else packaged_model()
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"{folder} is a file; a model is a directory in diffusers' layout")
        if folder.is_symlink():
            raise ModelError(f"{folder} is a link to {folder.readlink()}, which is not there")
        if not source or source.startswith(("/", ".", "~")) or source.count("/") != 1:
            raise ModelError(f"there is no model at {source or folder}")
        return _spec(source, folder.name, _File(), {}, {}, {})
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is no diffusers model: it has no model_index.json")
    return _spec(
        str(folder),
        folder.resolve().name,
        _read_toml(folder / "img2img.toml"),
        _read_json(folder / "model_index.json"),
        _read_json(folder / "scheduler" / "scheduler_config.json"),
        _read_json(folder / "unet" / "config.json"),
    )


def _spec(
    source: str,
    name: str,
    file: _File,
    index: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    unet: Mapping[str, Any],
) -> ModelSpec:
    found = SCHEDULER_OF_CLASS.get(str(scheduler.get("_class_name")), _FALLBACK_SCHEDULER)
    chosen = file.defaults.scheduler or found
    if chosen not in SCHEDULERS:
        known = ", ".join(SCHEDULERS)
        raise ModelError(f"scheduler {chosen!r} of {source} is not one of {known}")
    sample_size = unet.get("sample_size")
    native = sample_size * 8 if isinstance(sample_size, int) else 512
    return ModelSpec(
        source=source,
        name=file.name or name,
        family=file.family or ("sdxl" if "XL" in str(index.get("_class_name")) else "sd"),
        scheduler=chosen,
        num_inference_steps=file.defaults.num_inference_steps,
        guidance_scale=file.defaults.guidance_scale,
        strength=file.defaults.strength,
        max_num_inference_steps=file.limits.max_num_inference_steps,
        native_size=file.sizes.native or native,
        multiple=file.sizes.multiple,
        takes_negative_prompt=unet.get("time_cond_proj_dim") is None,
        lcm_max_steps=int(scheduler.get("original_inference_steps") or _LCM_STEPS),
    )


def _read_toml(path: Path) -> _File:
    if not path.is_file():
        return _File()
    try:
        return _File.model_validate(tomllib.loads(read_text(path)))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{path} is no TOML: {error}") from error
    except ValidationError as error:
        faults = (
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise ModelError(f"{path}: {'; '.join(faults)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no JSON object")
    return found
