"""The base class of all model families, with a method for each operation that families do
differently. A family has no state: the model is an argument. Importing a family must not import
torch or diffusers: the api and `check` read models without them. So functions that need torch
import it themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.domain.models import Guidance, ModelKind
from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.diffusers.samplers import (
    DIFFUSION_SAMPLERS,
    EDM_SAMPLERS,
    FLOW_SAMPLERS,
    check_scheduler,
    own_sampler,
)
from img2img_server.engine.distillation import Distillation, find_distillation
from img2img_server.engine.family import ModelError, ModelFiles, ModelTraits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from img2img_server.domain.prompt_syntax import Sections
    from img2img_server.engine.denoiser import Conditioning, TextEmbedding, TextInput
    from img2img_server.engine.diffusers.vae import Autoencoder
    from img2img_server.engine.diffusers.windows import ClipEncoder
    from img2img_server.engine.sampler import Schedule


# Parts of pipelines that the engine never runs. The service has a safety checker of its own.
UNUSED_PARTS = frozenset({"safety_checker", "feature_extractor", "image_encoder"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A pipeline of diffusers on its device.

    Attributes:
        network: The part that denoises.
        device, dtype: The network's own values, cached because it takes milliseconds to read them.
        memory_format: The layout of the inputs, one for all steps: a compiled network is compiled
            for the strides of its inputs.
        is_compiled: Whether new shapes of inputs are expensive.
    """

    pipeline: Any
    network: Any
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    is_compiled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """One forward of the denoiser: a row with its prompt or its negative prompt.

    Attributes:
        latents: 1 x c x h x w, float32; sizes differ only if the family's batch key allows it.
        timestep: The sampler's timestep, one number, float32.
        text: The part of the conditioning for this forward.
    """

    latents: Tensor
    timestep: Tensor
    text: TextEmbedding
    conditioning: Conditioning


class Family:
    """One family of models.

    Attributes:
        name: Its name in ModelInfo; empty in bases that several families share.
        pipelines: Classes that model_index.json may name, with the image-to-image class that
            loads such a model.
        load_options: Further arguments of from_pretrained.
        denoiser: The part of the pipeline that denoises.
        tokenizers: The parts of the pipeline that read prompts.
        lora_parts: The parts of the pipeline that a LoRA may change.
        takes_peft_names: Whether LoRA files may have peft's names with those of the authors' code;
            their alpha is the rank.
        original_names: Patterns of the denoiser's layers, with the names of these layers in the
            code of the model's authors, which some LoRA files have, for `original_layers`.
        can_fuse_projections: Whether diffusers computes the same with fused projections.
        default_scheduler: The scheduler of models without one.
        takes_float16: Whether models can run in float16 without overflows.
        takes_prompt_weights: Whether `encode_chunks` reads weighted prompts: of several sections if
            `clip_encoders` returns encoders, otherwise of one.
        unbatched_layers: A pattern of the layers whose inputs have not one row for each forward,
            so that rows with different LoRAs for them do not share batches.
        lengths_vary: Whether the network's inputs are as long as the prompts of a batch.
    """

    name: ClassVar[str] = ""
    pipelines: ClassVar[Mapping[str, str]] = {}
    load_options: ClassVar[Mapping[str, Any]] = {}
    kind: ClassVar[ModelKind]
    strength_rule: ClassVar[StrengthRule]
    schedulers: ClassVar[tuple[str, ...]]
    default_scheduler: ClassVar[str]
    denoiser: ClassVar[str]
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    lora_parts: ClassVar[tuple[str, ...]]
    takes_peft_names: ClassVar[bool] = False
    original_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    unbatched_layers: ClassVar[str] = ""
    takes_float16: ClassVar[bool] = True
    lengths_vary: ClassVar[bool] = False
    takes_prompt_weights: ClassVar[bool] = False
    can_fuse_projections: ClassVar[bool] = True
    side_multiple: ClassVar[int] = 16
    native_size: ClassVar[int] = 1024
    max_side: ClassVar[int] = 2048
    num_inference_steps: ClassVar[int] = 20
    guidance_scale: ClassVar[float] = 7.5

    # Methods for JSON files, before a model is loaded. They do not need torch.

    def traits(self, files: ModelFiles, scheduler: str = "") -> ModelTraits:
        """Returns the traits of a model of this family from its files.

        Raises:
            ModelError: The model cannot be served, or comes with a scheduler that is not offered.
        """
        if reason := self.refusal(files):
            raise ModelError(reason)
        check_scheduler(files.scheduler)
        config = files.config(self.denoiser)
        steps, guidance_scale = self.undistilled_defaults(files)
        own = scheduler or self.own_scheduler(files.scheduler)
        if few := self.distillation(files):
            steps = few.num_inference_steps or steps
            guidance_scale = guidance_scale if few.guidance_scale is None else few.guidance_scale
            offered = [it for it in few.schedulers if it in self.offered(files.scheduler)]
            own = own if scheduler or own in few.schedulers else next(iter(offered), own)
        return ModelTraits(
            family=self.name,
            kind=self.kind,
            strength_rule=self.strength_rule,
            guidance=self.guidance(config),
            takes_negative_prompt=self.guidance(config)
            in (Guidance.CLASSIFIER_FREE, Guidance.CLASSIFIER_FREE_FROM_ZERO),
            takes_prompt_weights=self.takes_prompt_weights,
            max_clip_skip=self.max_clip_skip(files),
            scheduler=own,
            schedulers=self.offered(files.scheduler),
            scheduler_max_steps=self.scheduler_max_steps(files.scheduler),
            native_size=self.native_side(config),
            side_multiple=self.side_multiple,
            max_side=self.max_side,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )

    def undistilled_defaults(self, files: ModelFiles) -> tuple[int, float]:
        """Returns the steps and the guidance scale of a model that is not distilled."""
        return self.num_inference_steps, self.guidance_scale

    def distillation(self, files: ModelFiles) -> Distillation | None:
        """Returns how a model was distilled for few steps; None: it was not."""
        kinds, stated = self.distillations(files), self.stated_distillation(files)
        return find_distillation(kinds, files.known_names, stated)

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        """Returns the kinds of distillation of the family that names show, the first one first."""
        return ()

    def stated_distillation(self, files: ModelFiles) -> Distillation | None:
        """Returns the kind of distillation that the files show, whatever the names are."""
        return None

    def max_clip_skip(self, files: ModelFiles) -> int:
        """Returns how many layers of the CLIP encoders a request may skip; 0: none can be."""
        return 0

    def parts(self, files: ModelFiles) -> Mapping[str, tuple[str, str]]:
        """Returns the parts of a model that are loaded, with the library and the class of each."""
        unused = {name for name, value in self.load_options.items() if value is None}
        unused |= UNUSED_PARTS
        return {name: entry for name, entry in files.parts.items() if name not in unused}

    def check_parts(self, files: ModelFiles) -> None:
        """Raises ModelError if the model lacks a part that every model of the family has."""
        found = self.parts(files)
        needed = (self.denoiser, "vae", "scheduler")
        if missing := [name for name in needed if name not in found]:
            place = next(iter(files.names), "the model")
            raise ModelError(
                f"model_index.json of {place} names no {', '.join(missing)}: it is incomplete"
            )

    def refusal(self, files: ModelFiles) -> str:
        """Returns why a model of this family cannot be served; empty if it can."""
        return ""

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        """Returns the effect of guidance_scale on a model.

        Args:
            config: The configuration of the denoiser.
        """
        return Guidance.CLASSIFIER_FREE

    def native_side(self, config: Mapping[str, Any]) -> int:
        """Returns the side of the images that a model was trained on."""
        return self.native_size

    def own_scheduler(self, config: Mapping[str, Any]) -> str:
        """Returns our name of the scheduler that a model comes with.

        Raises:
            ModelError: It is not offered. No other scheduler replaces it.
        """
        class_name = str(config.get("_class_name", ""))
        if not class_name:
            return self.default_scheduler
        name, offered = own_sampler(config), self.offered(config)
        if name not in offered:
            kinds = ("algorithm_type", "solver_order")
            kind = ", ".join(f"{key} {config[key]}" for key in kinds if key in config)
            raise ModelError(
                f"the model's own scheduler {class_name}{f' ({kind})' if kind else ''} is not "
                f"offered. Choose one of {', '.join(offered)} in its img2img.toml: "
                "[defaults] scheduler, or with IMG2IMG_DEFAULT_SCHEDULER"
            )
        return name

    def offered(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the schedulers that a model can run with.

        Args:
            config: The configuration of the model's own scheduler.
        """
        return self.schedulers

    def scheduler_max_steps(self, config: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        """Returns the limits of schedulers that run fewer steps than the model's limit, by name."""
        return ()

    # Methods for schedules.

    def scheduler_config(
        self, pipeline: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Returns the scheduler's configuration as the pipeline uses it.

        Args:
            pipeline: The configuration of the pipeline.
            config: The model's scheduler configuration.
        """
        return config

    def timestep_arguments(
        self, config: Mapping[str, Any], num_inference_steps: int, height: int, width: int
    ) -> Mapping[str, Hashable]:
        """Returns further arguments of the scheduler's set_timesteps.

        Args:
            config: The model's scheduler configuration.
        """
        return {}

    def strength_arguments(self, strength: float) -> Mapping[str, Hashable]:
        """Returns further arguments of the scheduler's set_timesteps that depend on strength."""
        return {}

    def derive_schedule(self, scheduler: Any, run: int, num_inference_steps: int) -> Schedule:
        """Returns the schedule of a scheduler whose timesteps are set: its last `run` steps."""
        from img2img_server.engine.diffusers.schedules import derive_schedule

        return derive_schedule(scheduler, run, num_inference_steps)

    def schedule_from_noise(
        self, make: Callable[..., Any], share: float, num_inference_steps: int
    ) -> Schedule:
        """Returns a schedule whose first step has this share of noise, which is above 0.

        Args:
            make: Returns a scheduler whose timesteps are set; its arguments change the scheduler's
                options.
        """
        from img2img_server.engine.diffusers.schedules import schedule_from_noise

        return schedule_from_noise(make, share, num_inference_steps, self.derive_schedule)

    def noise_shares(self, scheduler: Any, num_inference_steps: int) -> Iterable[float]:
        """Returns the shares of noise at which the steps of a scheduler whose timesteps are set
        begin, the last step's first.
        """
        from img2img_server.engine.diffusers.schedules import noise_shares

        return noise_shares(scheduler, num_inference_steps)

    # Methods for batches.

    def batch_key(self, text: TextInput) -> Hashable:
        """Returns the key that rows of one forward must share, apart from the LoRA."""
        return text.height, text.width

    def forwards(self, config: Mapping[str, Any], text: TextInput) -> int:
        """Returns how many forwards a step of a row costs: 2 with classifier-free guidance.

        Args:
            config: The configuration of the denoiser.
        """
        return self.guidance(config).forwards(text.guidance_scale)

    def cfg_scale(self, text: TextInput) -> float:
        """Returns the scale for `combine`."""
        return text.guidance_scale

    def combine(self, prompted: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """Returns the guided output of one row from its two forwards."""
        return negative + scale * (prompted - negative)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        """Runs the network once; returns the output of each forward.

        The outputs are 1 x c x h x w, float32, in the form that the family's schedulers take.
        """
        raise NotImplementedError

    # Methods for text.

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        """Encodes prompts in one batch; returns the tensors of each prompt by name.

        Each tensor belongs to one prompt and has no batch dimension. Lengths may differ.
        """
        raise NotImplementedError

    def encode_skipping(
        self, model: LoadedModel, prompts: Sequence[str], clip_skip: int
    ) -> list[Mapping[str, Tensor]]:
        """Encodes prompts without the last layers of the CLIP encoders, like `encode_prompts`.

        Families without such encoders encode them with all layers.
        """
        return self.encode_prompts(model, prompts, [False] * len(prompts))

    def clip_encoders(self, model: LoadedModel) -> Sequence[ClipEncoder]:
        """Returns the text encoders that read prompts in chunks; empty: none does."""
        return ()

    def encode_chunks(
        self,
        model: LoadedModel,
        sections: Sections,
        chunks: int,
        is_negative: bool,
        clip_skip: int = 0,
    ) -> Mapping[str, Tensor]:
        """Encodes a prompt that is weighted or has several chunks; returns its tensors by name.

        Args:
            sections: The prompt with its weights.
            chunks: The number of chunks of the result.
            clip_skip: How many of the last layers the encoders skip.
        """
        raise NotImplementedError

    def token_limit(self, tokenizer: Any) -> int:
        """Returns how many tokens of a prompt are read, special ones included."""
        return int(tokenizer.model_max_length)

    def extras(self, model: LoadedModel, text: TextInput) -> Mapping[str, Tensor]:
        """Returns further inputs of the network for the rows of one job, by name.

        Each tensor has a batch dimension of 1.
        """
        return {}

    # Methods for the autoencoder.

    def codec(self, vae: Any, tile_pixels: int) -> Autoencoder:
        """Returns the autoencoder between images and latents."""
        from img2img_server.engine.diffusers.vae import Autoencoder

        return Autoencoder(vae, tile_pixels)

    # Methods for LoRAs.

    def original_layers(self, network: Any, layers: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yields the denoiser's layers with their names in the code of the model's authors. Layers
        with the same name are one layer there, in this order.
        """
        for pattern, name in self.original_names:
            for layer in layers:
                if match := re.fullmatch(pattern, layer):
                    yield layer, match.expand(name)

    def swaps_halves(self, network: Any, layer: str) -> bool:
        """Returns whether the two halves of a layer's outputs have the other order in the code of
        the model's authors.
        """
        return False

    def convert_lora(
        self, model: LoadedModel, weights: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Renames the weights of a LoRA with the pipeline's own converter, which knows the names of
        many tools; may split weights. Returns them by PART.NAME.
        """
        converted, _ = model.pipeline.lora_state_dict(dict(weights), return_lora_metadata=True)
        return dict(converted)

    def lora_keys(self, part: str, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the LoRA's weights of one part, by the names of modules: NAME.lora_A.weight."""
        return weights


class FlowFamily(Family):
    """The schedules of families with flow matching."""

    kind = ModelKind.FLOW
    strength_rule = StrengthRule.CEIL
    schedulers = FLOW_SAMPLERS
    default_scheduler = "flow_match_euler"
    denoiser = "transformer"
    takes_float16 = False
    lora_parts: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder")

    def image_tokens(self, height: int, width: int) -> int:
        """Returns the number of tokens of an image, which dynamic shifting depends on."""
        return (height // 16) * (width // 16)

    def timestep_arguments(
        self, config: Mapping[str, Any], num_inference_steps: int, height: int, width: int
    ) -> Mapping[str, Hashable]:
        """Returns sigmas from 1 to 1/n and the shift for the size, as the pipelines do."""
        import numpy as np

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        found: dict[str, Hashable] = {"sigmas": tuple(sigmas.tolist())}
        if config.get("use_dynamic_shifting"):
            found["mu"] = dynamic_shift(config, self.image_tokens(height, width))
        return found


class DiffusionFamily(Family):
    """The common code of families with a variance schedule."""

    kind = ModelKind.DIFFUSION
    strength_rule = StrengthRule.FLOOR
    schedulers = DIFFUSION_SAMPLERS
    default_scheduler = "ddim"
    denoiser = "unet"

    def offered(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        # EDM models have other inputs and outputs than all other models.
        is_edm = str(config.get("_class_name", "")).startswith("EDM")
        return EDM_SAMPLERS if is_edm else self.schedulers


def dynamic_shift(config: Mapping[str, Any], tokens: int, default_max_shift: float = 1.15) -> float:
    """Returns the shift of a schedule for the number of image tokens, linear between two points."""
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", default_max_shift)
    slope = (high - low) / (most - fewest)
    return float(tokens * slope + (low - slope * fewest))
