"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, which a model may leave out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.engine.diffusers.families.base import (
    FlowFamily,
    Forward,
    LoadedModel,
    dynamic_shift,
)
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles, ModelTraits

if TYPE_CHECKING:
    from torch import Tensor

_T5_TOKENS = 256  # longest prompt in tokens, as in the stock pipelines
_FEW_STEPS = Distillation(  # 3.5 Large Turbo and Flash Diffusion
    names=lambda name: (
        name.describes("turbo")
        or name.has(r"flash-sd-?3|(?:sd|diffusion)-?3(?:-5)?(?:-(?:large|medium))?-flash")
    ),
    num_inference_steps=4,
    guidance_scale=1.0,
)
# 3.5 Medium Turbo and 3.5 Large TurboX
_EIGHT_STEPS = replace(_FEW_STEPS, num_inference_steps=8)


class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3, 3.5 Medium, 3.5 Large and 3.5 Large Turbo."""

    name = "sd3"
    pipelines = dict.fromkeys(
        (
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
        ),
        "StableDiffusion3Img2ImgPipeline",
    )
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    lora_parts: ClassVar[tuple[str, ...]] = (
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    )
    original_names = (
        *(
            (rf"transformer_blocks\.(\d+)\.(attn2?)\.to_{name}", r"joint_blocks.\1.x_block.\2.qkv")
            for name in "qkv"
        ),
        *(
            (
                rf"transformer_blocks\.(\d+)\.attn\.add_{name}_proj",
                r"joint_blocks.\1.context_block.attn.qkv",
            )
            for name in "qkv"
        ),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
        (
            r"transformer_blocks\.(\d+)\.attn\.to_add_out",
            r"joint_blocks.\1.context_block.attn.proj",
        ),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
        (
            r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj",
            r"joint_blocks.\1.context_block.mlp.fc1",
        ),
        (
            r"transformer_blocks\.(\d+)\.ff_context\.net\.2",
            r"joint_blocks.\1.context_block.mlp.fc2",
        ),
        (
            r"transformer_blocks\.(\d+)\.norm1\.linear",
            r"joint_blocks.\1.x_block.adaLN_modulation.1",
        ),
        (
            r"transformer_blocks\.(\d+)\.norm1_context\.linear",
            r"joint_blocks.\1.context_block.adaLN_modulation.1",
        ),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"proj_out", "final_layer.linear"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        *(
            (rf"time_text_embed\.{ours}_embedder\.linear_{number + 1}", f"{own}.mlp.{2 * number}")
            for ours, own in (("timestep", "t_embedder"), ("text", "y_embedder"))
            for number in range(2)
        ),
    )
    can_fuse_projections = False  # diffusers does not convert the norms of queries and keys
    takes_float16 = True
    num_inference_steps = 28
    guidance_scale = 7.0

    def swaps_halves(self, network: Any, layer: str) -> bool:
        # The context leaves the last block after its first norm.
        last = len(network.transformer_blocks) - 1
        return layer in ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")

    def traits(self, files: ModelFiles, scheduler: str = "") -> ModelTraits:
        found = super().traits(files, scheduler)
        # The size of the model's position embedding, in tokens of 2 x 2 latents.
        grid = files.config("transformer").get("pos_embed_max_size", 192)
        return replace(found, max_side=min(found.max_side, 16 * grid))

    def undistilled_defaults(self, files: ModelFiles) -> tuple[int, float]:
        config = files.config("transformer")
        if config.get("dual_attention_layers"):  # Stable Diffusion 3.5 Medium
            return 40, 4.5
        # Stable Diffusion 3.5 Large has normalised attention, too.
        return self.num_inference_steps, 3.5 if config.get("qk_norm") else self.guidance_scale

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        is_medium = files.config("transformer").get("dual_attention_layers")
        takes_eight = is_medium or any(name.has(r"turbo-?x") for name in files.known_names)
        return (_EIGHT_STEPS if takes_eight else _FEW_STEPS,)

    def refusal(self, files: ModelFiles) -> str:
        config = files.config("transformer")
        taken, given = config.get("in_channels", 16), config.get("out_channels", 16)
        if taken == given:
            return ""
        return (
            f"the model's transformer has {taken} input channels instead of {given}: models for "
            "inpainting are not served: use a model for text to image"
        )

    def timestep_arguments(
        self, config: Mapping[str, Any], num_inference_steps: int, height: int, width: int
    ) -> Mapping[str, Hashable]:
        # The pipeline lets the scheduler choose the sigmas.
        if not config.get("use_dynamic_shifting"):
            return {}
        return {"mu": dynamic_shift(config, self.image_tokens(height, width))}

    def token_limit(self, tokenizer: Any) -> int:
        return min(super().token_limit(tokenizer), _T5_TOKENS)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch

        output = model.network(
            hidden_states=torch.cat([forward.latents for forward in forwards]).to(model.dtype),
            timestep=torch.cat([forward.timestep for forward in forwards]),
            encoder_hidden_states=torch.stack([it.text.tensors["tokens"] for it in forwards]),
            pooled_projections=torch.stack([it.text.tensors["pooled"] for it in forwards]),
            return_dict=False,
        )[0]
        return torch.split(output.float(), 1)

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        return self.encode_skipping(model, prompts, 0)

    def max_clip_skip(self, files: ModelFiles) -> int:
        layers = [
            int(files.config(part).get("num_hidden_layers") or 0)
            for part in ("text_encoder", "text_encoder_2")
        ]
        return max(0, min(layers) - 1)  # Counted from the layer before the last one.

    def encode_skipping(
        self, model: LoadedModel, prompts: Sequence[str], clip_skip: int
    ) -> list[Mapping[str, Tensor]]:
        t5 = model.pipeline.tokenizer_3
        tokens, _, pooled, _ = model.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=model.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.token_limit(t5) if t5 else _T5_TOKENS,
            clip_skip=clip_skip or None,
        )
        tokens, pooled = tokens.to(model.dtype), pooled.to(model.dtype)
        return [
            {"tokens": row.clone(), "pooled": pooled_row.clone()}
            for row, pooled_row in zip(tokens, pooled, strict=True)
        ]
