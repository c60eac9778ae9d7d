"""Reads a model directory, whose layout is that of diffusers, or a single-file checkpoint.

In addition to diffusers' own files it can hold an `img2img.toml`; next to NAME.safetensors there
can be NAME.toml. Every entry has a default:

    name = "atelier"                  # default: the directory's name
    family = "sd"                     # default: by the pipeline class of model_index.json
    description = "Restyles photos."  # for readers of the file
    prediction_type = "epsilon"       # of single files; default: by the file

    [defaults]
    scheduler = "ddim"                # default: by scheduler/scheduler_config.json
    num_inference_steps = 20          # default of this and the next two: by the family
    guidance_scale = 7.5
    strength = 0.7

    [limits]
    max_num_inference_steps = 100

    [sizes]
    native = 512                      # default of this and the next one: by the family
    multiple = 8
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from img2img_server.domain.hub_id import HubId
from img2img_server.domain.models import Guidance, ModelInfo, ModelKind
from img2img_server.domain.noise_levels import NoiseLevels
from img2img_server.domain.params import DEFAULT_STRENGTH, MAX_SIDE_PIXELS, Limits
from img2img_server.domain.schedulers import offered_name
from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.checkpoint_file import read_checkpoint, toml_of
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.samplers import DIFFUSION_SAMPLERS
from img2img_server.engine.family import INDEX, TOML, ModelError, ModelFamily, ModelFiles
from img2img_server.engine.model_paths import fault_of_path, hint_of_folder
from img2img_server.engine.options import sizes
from img2img_server.engine.weight_files import is_pickle, refuse_pickle
from img2img_server.setting_files import read_text
from img2img_server.setting_names import in_words_of_settings

DEFAULT_MODEL = "atelier"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Defaults(_Part):
    scheduler: str = ""
    num_inference_steps: int = Field(default=0, ge=0, le=1000)  # 0: the family's default
    guidance_scale: float | None = Field(default=None, ge=0, le=Limits().max_guidance_scale)
    strength: float = Field(default=DEFAULT_STRENGTH, ge=0, le=1)


class _Limits(_Part):
    max_num_inference_steps: int = Field(default=100, ge=1, le=1000)


class _Sizes(_Part):
    native: int = Field(default=0, ge=0)
    multiple: int = Field(default=0, ge=0)


class _File(_Part):
    """The content of img2img.toml."""

    name: str = ""
    family: str = ""
    description: str = ""  # for readers of the file; the service does not use it
    prediction_type: Literal["", "epsilon", "v_prediction"] = ""  # of single files
    defaults: _Defaults = _Defaults()
    limits: _Limits = _Limits()
    sizes: _Sizes = _Sizes()


class FoundModel(Protocol):
    """A model whose files are on this machine: its folder, and the contents of its JSON files."""

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> ModelFiles: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model and its defaults.

    Attributes:
        source: The argument of from_pretrained, a directory or a hub id.
        multiple: The divisor of width and height.
        min_side, max_side: The limits of width and height, in addition to those of the service.
    """

    source: str
    name: str
    family: str = "sd"
    kind: ModelKind = ModelKind.DIFFUSION
    strength_rule: StrengthRule = StrengthRule.FLOOR
    guidance: Guidance = Guidance.CLASSIFIER_FREE
    scheduler: str = "ddim"
    schedulers: tuple[str, ...] = DIFFUSION_SAMPLERS
    scheduler_max_steps: tuple[tuple[str, int], ...] = ()
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    strength: float = DEFAULT_STRENGTH
    max_num_inference_steps: int = 100
    native_size: int = 512
    multiple: int = 8
    min_side: int = 0
    max_side: int = 1024
    takes_negative_prompt: bool = True
    takes_prompt_weights: bool = False
    max_clip_skip: int = 0
    loras: tuple[str, ...] = ()
    refused_loras: tuple[tuple[str, str], ...] = ()
    embeddings: tuple[str, ...] = ()
    noise_levels: tuple[NoiseLevels, ...] = ()

    @property
    def info(self) -> ModelInfo:
        """The model as the api announces it."""
        others = tuple(name for name in self.schedulers if name != self.scheduler)
        return ModelInfo(
            name=self.name,
            family=self.family,
            kind=self.kind,
            strength_rule=self.strength_rule,
            guidance=self.guidance,
            schedulers=(self.scheduler, *others),
            default_num_inference_steps=self.num_inference_steps,
            default_guidance_scale=self.guidance_scale,
            default_strength=self.strength,
            native_size=self.native_size,
            max_num_inference_steps=self.max_num_inference_steps,
            side_multiple=self.multiple,
            min_side_pixels=self.min_side,
            max_side_pixels=self.max_side,
            scheduler_max_steps=self.scheduler_max_steps,
            takes_negative_prompt=self.takes_negative_prompt,
            takes_prompt_weights=self.takes_prompt_weights,
            max_clip_skip=self.max_clip_skip,
            loras=self.loras,
            refused_loras=self.refused_loras,
            embeddings=self.embeddings,
            noise_levels=self.noise_levels,
        )

    def refusal(self, height: int, width: int, num_inference_steps: int) -> str:
        """Returns why the model cannot run this request, or "" if it can.

        The api has checked it with what the model announced, which may have changed since.
        """
        if num_inference_steps > self.max_num_inference_steps:
            return f"{self.name} runs at most {self.max_num_inference_steps} steps"
        if height % self.multiple or width % self.multiple:
            return f"{self.name} needs sides divisible by {self.multiple}"
        return ""


def packaged_model() -> Path:
    """Returns the directory of the model inside the package."""
    return Path(str(resources.files("img2img_server"))) / "models" / DEFAULT_MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults:
    """Defaults that an operator sets instead of the model's own; see the settings of the same
    names.
    """

    model_name: str = ""
    default_scheduler: str = ""
    default_num_inference_steps: int = 0
    default_guidance_scale: float = -1.0
    default_strength: float = -1.0
    native_size: int = 0
    allow_pickles: bool = False
    gguf_file: Path | None = None

    @classmethod
    def of(cls, source: object) -> Self:
        """Returns the defaults from attributes of the same names."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})

    def over(self, file: _File) -> _File:
        """Returns the content of img2img.toml, with these defaults replacing its own."""
        own = {
            "scheduler": self.default_scheduler or None,
            "num_inference_steps": self.default_num_inference_steps or None,
            "guidance_scale": self.default_guidance_scale,
            "strength": self.default_strength,
        }
        chosen = {name: value for name, value in own.items() if value not in (None, -1.0)}
        sizes = {"native": self.native_size} if self.native_size else {}
        return file.model_copy(
            update={
                "name": self.model_name or file.name,
                "defaults": file.defaults.model_copy(update=chosen),
                "sizes": file.sizes.model_copy(update=sizes),
            }
        )


def size_faults(warm_up_sizes: str, spec: ModelSpec, max_side: int = MAX_SIDE_PIXELS) -> list[str]:
    """Returns a sentence for each mistake in the setting of these sizes.

    Args:
        max_side: The largest side of requests, apart from the model's own limit.
    """
    faults = []
    most = min(spec.max_side, max_side)
    for height, width in sizes(warm_up_sizes):
        if height % spec.multiple or width % spec.multiple:
            faults.append(f"{width}x{height}: {spec.name} needs sides divisible by {spec.multiple}")
        if max(height, width) > most:
            faults.append(f"{width}x{height}: requests have sides of at most {most}")
    return faults


def read_model_spec(
    source: str, found: FoundModel | None = None, defaults: ModelDefaults | None = None
) -> ModelSpec:
    """Reads a model directory; an empty source is the model inside the package.

    Args:
        found: The downloaded files of a hub id; None: unknown.

    Raises:
        ModelError: The directory is not one of diffusers', the model cannot be served, or its
            img2img.toml is wrong.
    """
    defaults = defaults or ModelDefaults()
    folder = Path(source) if source else packaged_model()
    if not folder.is_dir():
        if folder.is_file():
            return _single_file(folder, found, defaults)
        if folder.exists():
            raise ModelError(
                f"{folder} is no directory and no file: name the folder or the file of a model"
            )
        if folder.is_symlink():
            raise ModelError(
                f"{folder} is a link to {folder.readlink()}, which does not exist: correct the link"
            )
        hub_id = HubId.parse(source)
        if hub_id is None:
            raise ModelError(f"there is no model at {fault_of_path(source or str(folder))}")
        if found is None:
            return ModelSpec(source=source, name=defaults.model_name or hub_id.repo)
        toml = defaults.over(_read_toml(found.path / TOML))
        return _spec(source, hub_id.repo, toml, found.files, defaults)
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{folder} is no diffusers model: it has no {INDEX}{hint_of_folder(folder)}"
        )
    toml = defaults.over(_read_toml(folder / TOML))
    return _spec(str(folder), folder.resolve().name, toml, ModelFiles.read(folder), defaults)


def _single_file(path: Path, found: FoundModel | None, defaults: ModelDefaults) -> ModelSpec:
    toml = defaults.over(_read_toml(toml_of(path)))
    if found is not None:
        return _spec(str(path), path.stem, toml, found.files, defaults)
    if is_pickle(path):
        refuse_pickle(path, defaults.allow_pickles)
        return ModelSpec(source=str(path), name=toml.name or path.stem)
    return _spec(str(path), path.stem, toml, _checkpoint(path, defaults), defaults)


def _checkpoint(path: Path, defaults: ModelDefaults) -> ModelFiles:
    return read_checkpoint(path, model_name=defaults.model_name).files


def _spec(
    source: str, name: str, file: _File, files: ModelFiles, defaults: ModelDefaults
) -> ModelSpec:
    files = files.named(defaults.model_name, defaults.gguf_file)
    family: ModelFamily = detect(files, source)
    offered = family.offered(files.scheduler)
    chosen = offered_name(file.defaults.scheduler, offered)
    if chosen and chosen not in offered:
        known = ", ".join(offered)
        setting = "default_scheduler" if defaults.default_scheduler else "model"
        raise ModelError(
            f"scheduler {chosen!r} of {source} is not one of {known}: use one of these", setting
        )
    try:
        traits = family.traits(files, chosen)
    except ModelError as error:
        raise ModelError(f"{source}: {error}", error.setting) from error
    scale = file.defaults.guidance_scale
    return ModelSpec(
        source=source,
        name=file.name or name,
        family=file.family or traits.family,
        kind=traits.kind,
        strength_rule=traits.strength_rule,
        guidance=traits.guidance,
        scheduler=traits.scheduler,
        schedulers=traits.schedulers,
        scheduler_max_steps=traits.scheduler_max_steps,
        num_inference_steps=file.defaults.num_inference_steps or traits.num_inference_steps,
        guidance_scale=traits.guidance_scale if scale is None else scale,
        strength=file.defaults.strength,
        max_num_inference_steps=file.limits.max_num_inference_steps,
        native_size=file.sizes.native or traits.native_size,
        # The family's own multiple is a limit of its network.
        multiple=math.lcm(file.sizes.multiple or 1, traits.side_multiple),
        min_side=traits.min_side,
        max_side=traits.max_side,
        takes_negative_prompt=traits.takes_negative_prompt,
        takes_prompt_weights=traits.takes_prompt_weights,
        max_clip_skip=traits.max_clip_skip,
    )


def _read_toml(path: Path) -> _File:
    if not path.is_file():
        return _File()
    try:
        return _File.model_validate(tomllib.loads(read_text(path)))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}: correct or remove it"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{path} is no TOML: {error}: correct this line") from error
    except ValidationError as error:
        faults = (
            f"{'.'.join(str(part) for part in fault['loc'])}: {_sentence(fault)}"
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise ModelError(f"{path}: {'; '.join(faults)}: correct the file") from error


def _sentence(fault: ErrorDetails) -> str:
    """Returns an error of pydantic in the words of the errors of settings."""
    if fault["type"] == "extra_forbidden":
        place = fault["loc"][:-1]
        part = _File.model_fields[str(place[0])].annotation if place else _File
        return f"there is no such entry; there are {', '.join(getattr(part, 'model_fields', ()))}"
    return in_words_of_settings(fault["msg"])
