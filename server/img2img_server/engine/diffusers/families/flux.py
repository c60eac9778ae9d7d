"""FLUX.1 dev and schnell: packed latents, CLIP and T5 prompts, guidance as an input of dev."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.domain.models import Guidance, true_cfg_forwards
from img2img_server.domain.prompt_syntax import plain_text
from img2img_server.engine.diffusers.families.base import (
    FlowFamily,
    Forward,
    LoadedModel,
)
from img2img_server.engine.diffusers.families.packing import pack, unpack
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles, ModelTraits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from img2img_server.domain.prompt_syntax import Sections
    from img2img_server.engine.denoiser import TextInput

_T5_TOKENS = 512  # longest prompt in tokens, as in the stock pipelines
_SCHNELL = Distillation(
    names=lambda name: name.has(r"\w*schnell\w*"), num_inference_steps=4, is_general=True
)
_KREA_GUIDANCE_SCALE = 4.5
# Merges of dev with schnell or with a LoRA for few steps keep the guidance scale of dev.
_DISTILLATIONS = (
    _SCHNELL,
    Distillation(
        names=lambda name: (
            name.describes("turbo")
            or name.describes("hyper", needs_detail=True)
            or name.num_steps in (4, 8, 16)
        ),
        num_inference_steps=8,
        is_general=True,
    ),
)


class PackedFamily(FlowFamily):
    """The common part of FLUX.1 and models with its tokens, its T5 prompts and its LoRA files."""

    original_names = (
        *(
            (rf"transformer_blocks\.(\d+)\.{ours}", rf"double_blocks.\1.{own}")
            for ours, own in (
                *((rf"attn\.to_{name}", "img_attn.qkv") for name in "qkv"),
                *((rf"attn\.add_{name}_proj", "txt_attn.qkv") for name in "qkv"),
                (r"attn\.to_out\.0", "img_attn.proj"),
                (r"attn\.to_add_out", "txt_attn.proj"),
                (r"ff\.net\.0\.proj", "img_mlp.0"),
                (r"ff\.net\.2", "img_mlp.2"),
                (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
                (r"ff_context\.net\.2", "txt_mlp.2"),
                (r"norm1\.linear", "img_mod.lin"),
                (r"norm1_context\.linear", "txt_mod.lin"),
            )
        ),
        *(
            (rf"single_transformer_blocks\.(\d+)\.{ours}", rf"single_blocks.\1.{own}")
            for ours, own in (
                *((rf"attn\.to_{name}", "linear1") for name in "qkv"),
                (r"proj_mlp", "linear1"),
                (r"proj_out", "linear2"),
                (r"norm\.linear", "modulation.lin"),
            )
        ),
        (r"x_embedder", "img_in"),
        (r"context_embedder", "txt_in"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"proj_out", "final_layer.linear"),
        *(
            (rf"time_text_embed\.{ours}_embedder\.linear_{number}", f"{own}_in.{side}_layer")
            for ours, own in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
            for number, side in ((1, "in"), (2, "out"))
        ),
        *(
            (
                rf"distilled_guidance_layer\.layers\.(\d+)\.linear_{number}",
                rf"distilled_guidance_layer.layers.\1.{side}_layer",
            )
            for number, side in ((1, "in"), (2, "out"))
        ),
    )

    takes_peft_names: ClassVar[bool] = True

    def swaps_halves(self, network: Any, layer: str) -> bool:
        return layer == "norm_out.linear"

    def refusal(self, files: ModelFiles) -> str:
        config = files.config("transformer")
        taken = config.get("in_channels")
        given = config.get("out_channels") or taken
        if taken == given:
            return ""
        return (
            f"the model's transformer has {taken} input channels instead of {given}: models for "
            "inpainting or with a control image are not served"
        )

    def token_limit(self, tokenizer: Any) -> int:
        return min(super().token_limit(tokenizer), _T5_TOKENS)

    def convert_lora(
        self, model: LoadedModel, weights: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        converted, _ = model.pipeline.lora_state_dict(dict(weights), return_alphas=True)
        return dict(converted)


class Flux(PackedFamily):
    """FLUX.1 dev, schnell and models derived from them."""

    name = "flux"
    pipelines = dict.fromkeys(
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"), "FluxImg2ImgPipeline"
    )
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    lora_parts: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder", "text_encoder_2")
    takes_prompt_weights = True
    num_inference_steps = 28
    guidance_scale = 3.5

    def traits(self, files: ModelFiles, scheduler: str = "") -> ModelTraits:
        return replace(super().traits(files, scheduler), takes_negative_prompt=True)

    def undistilled_defaults(self, files: ModelFiles) -> tuple[int, float]:
        if self.guidance(files.config(self.denoiser)) is Guidance.NONE:
            return self.num_inference_steps, 1.0
        is_krea = any(name.has("krea") for name in files.known_names)
        return self.num_inference_steps, _KREA_GUIDANCE_SCALE if is_krea else self.guidance_scale

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        return _DISTILLATIONS

    def stated_distillation(self, files: ModelFiles) -> Distillation | None:
        # Schnell and models derived from it take no guidance.
        is_schnell = self.guidance(files.config(self.denoiser)) is Guidance.NONE
        return _SCHNELL if is_schnell else None

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        return Guidance.EMBEDDED if config.get("guidance_embeds") else Guidance.NONE

    def forwards(self, config: Mapping[str, Any], text: TextInput) -> int:
        return true_cfg_forwards(text.negative_prompt, text.true_cfg_scale)

    def cfg_scale(self, text: TextInput) -> float:
        return text.true_cfg_scale or 1.0

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch

        guidance = None
        if model.network.config.guidance_embeds:
            guidance = torch.stack([it.conditioning.guidance_scale for it in forwards])
        return predict_packed(
            model,
            forwards,
            guidance=guidance,
            pooled_projections=torch.stack([it.text.tensors["pooled"] for it in forwards]),
        )

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        tokens, pooled, _ = model.pipeline.encode_prompt(
            prompt=list(prompts),
            device=model.device,
            max_sequence_length=self.token_limit(model.pipeline.tokenizer_2),
        )
        tokens, pooled = tokens.to(model.dtype), pooled.to(model.dtype)
        return [
            {"tokens": row.clone(), "pooled": pooled_row.clone()}
            for row, pooled_row in zip(tokens, pooled, strict=True)
        ]

    def encode_chunks(
        self,
        model: LoadedModel,
        sections: Sections,
        chunks: int,
        is_negative: bool,
        clip_skip: int = 0,
    ) -> Mapping[str, Tensor]:
        from img2img_server.engine.diffusers.windows import encode_weighted

        parts, (fragments,) = model.pipeline, sections
        tokenizer = parts.tokenizer_2
        limit = self.token_limit(tokenizer)
        tokens = encode_weighted(tokenizer, parts.text_encoder_2, fragments, limit, model.device)
        # The pooled embedding of CLIP has no weights, as with compel.
        pooled = parts._get_clip_prompt_embeds([plain_text(sections)], device=model.device)[0]
        return {"tokens": tokens.to(model.dtype), "pooled": pooled.to(model.dtype)}


def predict_packed(
    model: LoadedModel, forwards: Sequence[Forward], **inputs: Any
) -> Sequence[Tensor]:
    """Runs a transformer that reads 2 x 2 latents as one token, as FLUX.1 does.

    Args:
        inputs: Further inputs of the transformer.
    """
    import torch

    latents = torch.cat([forward.latents for forward in forwards]).to(model.dtype)
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    tokens = torch.stack([forward.text.tensors["tokens"] for forward in forwards])
    output = model.network(
        hidden_states=pack(latents),
        timestep=torch.cat([forward.timestep for forward in forwards]) / 1000,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=model.device, dtype=model.dtype),
        img_ids=_positions(height, width, model),
        return_dict=False,
        **inputs,
    )[0]
    return torch.split(unpack(output.float(), height, width), 1)


def _positions(height: int, width: int, model: LoadedModel) -> torch.Tensor:
    """Returns the row and the column of each token, created on the device: a copy from the host
    would wait.
    """
    import torch

    numbers = torch.arange(height * width, device=model.device)
    rows, columns = numbers // width, numbers % width
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1).to(model.dtype)
