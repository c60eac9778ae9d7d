"""Lumina-Image 2.0: one stream of text and image tokens, after refinement of each.

Diffusers has no image-to-image pipeline for it; the init image is noised as in other families with
flow matching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from img2img_server.engine.diffusers.families.base import FlowFamily, Forward, LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

# longest prompt in tokens, with the system prompt before it, as in the stock pipeline
_TOKENS = 256
_SEPARATOR = " <Prompt Start> "
_SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts."
)


class Lumina2(FlowFamily):
    """Lumina-Image 2.0 and models derived from it."""

    name = "lumina2"
    pipelines = dict.fromkeys(("Lumina2Pipeline", "Lumina2Text2ImgPipeline"), "Lumina2Pipeline")
    original_names = (
        *((rf"(.*)\.attn\.to_{name}", r"\1.attention.qkv") for name in "qkv"),
        (r"(.*)\.attn\.to_out\.0", r"\1.attention.out"),
        (r"(.*)\.feed_forward\.linear_(\d)", r"\1.feed_forward.w\2"),
        (r"(.*)\.norm1\.linear", r"\1.adaLN_modulation.1"),
        (r"time_caption_embed\.caption_embedder\.(\d)", r"cap_embedder.\1"),
        (r"time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
        (r"norm_out\.linear_2", "final_layer.linear"),
    )
    lengths_vary = True
    num_inference_steps = 30
    guidance_scale = 4.0

    def combine(self, prompted: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        import torch

        mixed = negative + scale * (prompted - negative)
        # The stock pipeline keeps the norm of each line of each channel.
        norms = [torch.linalg.vector_norm(it, dim=-1, keepdim=True) for it in (prompted, mixed)]
        guided: Tensor = mixed * (norms[0] / norms[1])
        return guided

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch

        output = model.network(
            hidden_states=torch.cat([forward.latents for forward in forwards]).to(model.dtype),
            timestep=1 - torch.cat([forward.timestep for forward in forwards]) / 1000,
            encoder_hidden_states=torch.stack([it.text.tensors["tokens"] for it in forwards]),
            encoder_attention_mask=torch.stack([it.text.tensors["mask"] for it in forwards]),
            return_dict=False,
        )[0]
        return torch.split(-output.float(), 1)

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        # The stock pipeline puts no system prompt before a negative prompt.
        texts = [
            prompt if is_negative else _SYSTEM_PROMPT + _SEPARATOR + prompt
            for prompt, is_negative in zip(prompts, are_negative, strict=True)
        ]
        encoded, masks = model.pipeline._get_gemma_prompt_embeds(
            texts, device=model.device, max_sequence_length=_TOKENS
        )
        encoded = encoded.to(model.dtype)
        return [
            {"tokens": tokens.clone(), "mask": mask.bool()}
            for tokens, mask in zip(encoded, masks, strict=True)
        ]

    def token_limit(self, tokenizer: Any) -> int:
        before = tokenizer(_SYSTEM_PROMPT + _SEPARATOR, add_special_tokens=False)["input_ids"]
        return _TOKENS - len(before)
