"""Stable Diffusion 1.x and 2.x with their Turbo models; the base of SDXL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.domain.models import Guidance
from img2img_server.engine.diffusers.families.base import (
    DiffusionFamily,
    Forward,
    LoadedModel,
)
from img2img_server.engine.diffusers.unet_names import original_unet_name
from img2img_server.engine.distillation import (
    LCM,
    LCM_EMBEDDED,
    ORIGINAL_TURBO,
    TCD,
    UNET_DISTILLATIONS,
    Distillation,
)
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.domain.prompt_syntax import Sections
    from img2img_server.engine.denoiser import TextInput
    from img2img_server.engine.diffusers.windows import ClipEncoder

# Schedulers of Turbo models, together with trailing timesteps.
_TURBO = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_EDM_GUIDANCE_SCALE = 3.0
# number of steps of the schedule from which LCM chooses its steps, the default of diffusers
_LCM_STEPS = 50


class StableDiffusion(DiffusionFamily):
    """Models with a UNet and one CLIP text encoder.

    Attributes:
        takes_last_layer: Whether the UNet takes the output of the encoder's last layer.
    """

    name = "sd"
    pipelines = dict.fromkeys(
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
        ),
        "StableDiffusionImg2ImgPipeline",
    )
    load_options: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }
    lora_parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    takes_prompt_weights = True
    takes_last_layer: ClassVar[bool] = True
    side_multiple = 8
    native_size = 512
    max_side = 1024

    def undistilled_defaults(self, files: ModelFiles) -> tuple[int, float]:
        is_edm = str(files.scheduler.get("_class_name", "")).startswith("EDM")
        scale = _EDM_GUIDANCE_SCALE if is_edm else self.guidance_scale
        return self.num_inference_steps, scale

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        return UNET_DISTILLATIONS

    def stated_distillation(self, files: ModelFiles) -> Distillation | None:
        config = files.scheduler
        own = config.get("_class_name")
        # Models with the guidance scale as an input are consistency models.
        if self.guidance(files.config("unet")) is Guidance.EMBEDDED:
            return LCM_EMBEDDED
        if own == "LCMScheduler":
            return LCM
        if own == "TCDScheduler":
            return TCD
        is_plain = config.get("prediction_type", "epsilon") == "epsilon"
        is_trailing = config.get("timestep_spacing") == "trailing"
        if own in _TURBO and is_plain and is_trailing and not config.get("rescale_betas_zero_snr"):
            return ORIGINAL_TURBO
        return None

    def refusal(self, files: ModelFiles) -> str:
        unet = files.config("unet")
        taken, given = unet.get("in_channels", 4), unet.get("out_channels", 4)
        if taken == given:
            return ""
        return (
            f"the model's UNet has {taken} input channels instead of {given}: models for "
            "inpainting, for instructions or for upscaling are not served: use a model for text "
            "to image"
        )

    def max_clip_skip(self, files: ModelFiles) -> int:
        layers = [
            int(files.config(part).get("num_hidden_layers") or 0)
            for part in files.parts
            if part.startswith("text_encoder")
        ]
        # Stable Diffusion XL counts from the layer before the last one.
        return max(0, min(layers, default=0) - (not self.takes_last_layer))

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        # Models distilled with guidance take the scale as an input and need no second forward.
        is_embedded = config.get("time_cond_proj_dim") is not None
        return Guidance.EMBEDDED if is_embedded else Guidance.CLASSIFIER_FREE

    def native_side(self, config: Mapping[str, Any]) -> int:
        sample_size = config.get("sample_size")
        return sample_size * 8 if isinstance(sample_size, int) else self.native_size

    def scheduler_max_steps(self, config: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        most = int(config.get("original_inference_steps") or _LCM_STEPS)
        return ("lcm", most), ("tcd", most)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch

        tokens, mask = self.tokens(model, forwards)
        output = model.network(
            torch.cat([forward.latents for forward in forwards]).to(
                model.dtype, memory_format=model.memory_format
            ),
            torch.cat([forward.timestep for forward in forwards]),
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask,
            timestep_cond=cat_extras(forwards, "guidance_embedding"),
            added_cond_kwargs=self.added_conditions(forwards),
            return_dict=False,
        )[0]
        return torch.split(output.float(), 1)

    def tokens(
        self, model: LoadedModel, forwards: Sequence[Forward]
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the encoded prompts and their mask; None: all tokens count."""
        from img2img_server.engine.diffusers.windows import pad_chunks

        window = int(model.pipeline.tokenizer.model_max_length)
        rows = [forward.text.tensors["tokens"] for forward in forwards]
        return pad_chunks(rows, window, model.is_compiled)

    def added_conditions(self, forwards: Sequence[Forward]) -> Mapping[str, Tensor] | None:
        """Returns further inputs of the UNet."""
        return None

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        encoded = encode(model, prompts)[0].to(model.dtype)
        return [{"tokens": tokens.clone()} for tokens in encoded]

    def encode_skipping(
        self, model: LoadedModel, prompts: Sequence[str], clip_skip: int
    ) -> list[Mapping[str, Tensor]]:
        # The stock pipeline looks for the last norm at a place where transformers 5 has none.
        (encoder,) = self.clip_encoders(model)
        texts = [model.pipeline.maybe_convert_prompt(it, encoder.tokenizer) for it in prompts]
        encoded = encoder.encode_windows(texts, clip_skip, model.device).to(model.dtype)
        return [{"tokens": tokens.clone()} for tokens in encoded]

    def clip_encoders(self, model: LoadedModel) -> Sequence[ClipEncoder]:
        from img2img_server.engine.diffusers.windows import ClipEncoder

        parts = model.pipeline
        return [
            ClipEncoder(tokenizer, text_encoder, is_normalized=self.takes_last_layer)
            for name in self.tokenizers
            if (tokenizer := getattr(parts, name)) is not None
            and (text_encoder := getattr(parts, name.replace("tokenizer", "text_encoder")))
        ]

    def encode_chunks(
        self,
        model: LoadedModel,
        sections: Sections,
        chunks: int,
        is_negative: bool,
        clip_skip: int = 0,
    ) -> Mapping[str, Tensor]:
        (encoder,) = self.clip_encoders(model)
        tokens = encoder.encode(sections, chunks, model.device, clip_skip)
        return {"tokens": tokens.to(model.dtype)}

    def token_limit(self, tokenizer: Any) -> int:
        from img2img_server.engine.diffusers.windows import MAX_TOKENS, SPECIAL_TOKENS

        return MAX_TOKENS + SPECIAL_TOKENS

    def extras(self, model: LoadedModel, text: TextInput) -> Mapping[str, Tensor]:
        import torch

        from img2img_server.engine.host_copy import to_device

        if (width := model.network.config.time_cond_proj_dim) is None:
            return {}
        embedding = model.pipeline.get_guidance_scale_embedding(
            torch.tensor([text.guidance_scale - 1]), embedding_dim=width
        )
        return {"guidance_embedding": to_device(embedding, model.device).to(model.dtype)}

    def original_layers(self, network: Any, layers: Sequence[str]) -> Iterator[tuple[str, str]]:
        for layer in layers:
            if name := original_unet_name(network.config, layer):
                yield layer, name

    def convert_lora(
        self, model: LoadedModel, weights: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        converted, _ = model.pipeline.lora_state_dict(
            dict(weights), unet_config=model.network.config
        )
        return dict(converted)

    def lora_keys(self, part: str, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        from diffusers.utils.state_dict_utils import (
            StateDictType,
            convert_state_dict_to_peft,
            convert_unet_state_dict_to_peft,
        )

        if part == "unet":
            return dict(convert_unet_state_dict_to_peft(weights))  # type: ignore[no-untyped-call]
        if not weights or any(".lora_A.weight" in key for key in weights):
            return weights
        is_old = any("_lora." in key for key in weights)
        form = StateDictType.DIFFUSERS_OLD if is_old else StateDictType.DIFFUSERS
        return dict(convert_state_dict_to_peft(weights, form))  # type: ignore[no-untyped-call]


def encode(model: LoadedModel, prompts: Sequence[str], clip_skip: int = 0) -> Any:
    """Returns the pipeline's encoding of prompts, without negative prompts."""
    return model.pipeline.encode_prompt(
        list(prompts),
        device=model.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **({"clip_skip": clip_skip} if clip_skip else {}),
    )


def cat_extras(forwards: Sequence[Forward], name: str) -> Tensor | None:
    """Returns a further input of all forwards, or None for models that do not have it."""
    import torch

    found = [forward.conditioning.extras.get(name) for forward in forwards]
    present = [tensor for tensor in found if tensor is not None]
    return torch.cat(present) if present else None
