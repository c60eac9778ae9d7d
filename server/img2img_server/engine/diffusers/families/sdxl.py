"""Stable Diffusion XL: two text encoders and the image's size as further inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.domain.prompt_syntax import plain_text
from img2img_server.engine.diffusers.families.base import Forward, LoadedModel
from img2img_server.engine.diffusers.families.sd import StableDiffusion, cat_extras, encode
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.domain.prompt_syntax import Sections
    from img2img_server.engine.denoiser import TextInput


class StableDiffusionXL(StableDiffusion):
    """Models with a UNet, two CLIP text encoders and size inputs."""

    name = "sdxl"
    pipelines = dict.fromkeys(
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        "StableDiffusionXLImg2ImgPipeline",
    )
    load_options: ClassVar[Mapping[str, Any]] = {}
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    lora_parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2")
    takes_last_layer = False
    native_size = 1024
    max_side = 2048

    def refusal(self, files: ModelFiles) -> str:
        # The refiner has the second text encoder only.
        is_refiner = files.index.get("requires_aesthetics_score")
        if is_refiner or "text_encoder" in files.absent_parts:
            return "the SDXL refiner is not served: use an SDXL base model"
        return super().refusal(files)

    def added_conditions(self, forwards: Sequence[Forward]) -> Mapping[str, Tensor] | None:
        import torch

        sizes = cat_extras(forwards, "time_ids")
        assert sizes is not None
        pooled = torch.stack([forward.text.tensors["pooled"] for forward in forwards])
        return {"text_embeds": pooled, "time_ids": sizes}

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        encoded, dtype = encode(model, prompts), model.dtype
        tokens, pooled = encoded[0].to(dtype), encoded[2].to(dtype)
        found: list[Mapping[str, Tensor]] = []
        for i, (prompt, is_negative) in enumerate(zip(prompts, are_negative, strict=True)):
            keep = _kept_share(model, prompt, is_negative)
            found.append({"tokens": tokens[i] * keep, "pooled": pooled[i] * keep})
        return found

    def encode_skipping(
        self, model: LoadedModel, prompts: Sequence[str], clip_skip: int
    ) -> list[Mapping[str, Tensor]]:
        encoded, dtype = encode(model, prompts, clip_skip), model.dtype
        return [
            {"tokens": tokens.clone(), "pooled": pooled.clone()}
            for tokens, pooled in zip(encoded[0].to(dtype), encoded[2].to(dtype), strict=True)
        ]

    def encode_chunks(
        self,
        model: LoadedModel,
        sections: Sections,
        chunks: int,
        is_negative: bool,
        clip_skip: int = 0,
    ) -> Mapping[str, Tensor]:
        import torch

        prompt = plain_text(sections)
        encoders, keep = self.clip_encoders(model), _kept_share(model, prompt, is_negative)
        tokens = [encoder.encode(sections, chunks, model.device, clip_skip) for encoder in encoders]
        return {
            "tokens": torch.cat(tokens, dim=-1).to(model.dtype) * keep,
            # The pooled embedding is that of the first window without weights, as in the stock
            # pipeline.
            "pooled": encode(model, [prompt])[2][0].to(model.dtype) * keep,
        }

    def extras(self, model: LoadedModel, text: TextInput) -> Mapping[str, Tensor]:
        import torch

        from img2img_server.engine.host_copy import to_device

        # The defaults of diffusers: original size = target size, no crop.
        size = (text.height, text.width)
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=model.dtype)
        sizes = to_device(sizes, model.device)
        return {**super().extras(model, text), "time_ids": sizes}


def _kept_share(model: LoadedModel, prompt: str, is_negative: bool) -> float:
    """Returns the factor of a prompt's encoding: SDXL was trained with zeros, not with the encoding
    of "", for an empty prompt.
    """
    is_zero = model.pipeline.config.force_zeros_for_empty_prompt and is_negative and not prompt
    return 0.0 if is_zero else 1.0
