"""Krea 2: one stream of text and image tokens, the states of several layers of a language model.

Diffusers has no image-to-image pipeline for it; the init image is noised as in other families with
flow matching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.domain.models import Guidance
from img2img_server.engine.diffusers.families.base import FlowFamily, Forward, LoadedModel
from img2img_server.engine.diffusers.families.codecs import one_frame
from img2img_server.engine.diffusers.families.packing import pack, unpack
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.engine.diffusers.vae import Autoencoder

# longest prompt in tokens, as in the stock pipeline; the end of the chat template takes 5 of them
_TOKENS, _SUFFIX = 512, 5
_DISTILLED_SHIFT = 1.15
_TURBO = Distillation(
    names=lambda name: name.describes("turbo"), num_inference_steps=8, guidance_scale=0.0
)


class Krea2(FlowFamily):
    """Krea 2 and its distilled model."""

    name = "krea2"
    unbatched_layers = r"text_fusion\.layerwise_blocks\..*"
    pipelines: ClassVar[Mapping[str, str]] = {"Krea2Pipeline": "Krea2Pipeline"}
    can_fuse_projections = False  # diffusers' attention of this model does not use them
    lengths_vary = True
    num_inference_steps = 28
    guidance_scale = 4.5

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        return (_TURBO,)

    def stated_distillation(self, files: ModelFiles) -> Distillation | None:
        return _TURBO if files.index.get("is_distilled") else None

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        return Guidance.CLASSIFIER_FREE_FROM_ZERO

    def scheduler_config(
        self, pipeline: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        if pipeline.get("is_distilled"):  # The same shift for all sizes.
            return {**config, "base_shift": _DISTILLED_SHIFT, "max_shift": _DISTILLED_SHIFT}
        return {"max_image_seq_len": 6400, **config}

    def combine(self, prompted: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        return prompted + scale * (prompted - negative)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        latents = torch.cat([forward.latents for forward in forwards]).to(model.dtype)
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        texts = [forward.text.tensors["tokens"] for forward in forwards]
        ones = [torch.ones(len(text), dtype=torch.bool, device=model.device) for text in texts]
        tokens = pad_sequence(texts, batch_first=True)
        output = model.network(
            hidden_states=pack(latents),
            encoder_hidden_states=tokens,
            encoder_attention_mask=pad_sequence(ones, batch_first=True),
            timestep=(torch.cat([forward.timestep for forward in forwards]) / 1000).to(model.dtype),
            position_ids=model.pipeline.prepare_position_ids(
                tokens.shape[1], height, width, model.device
            ),
            return_dict=False,
        )[0]
        return torch.split(unpack(output.float(), height, width), 1)

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        encoded, masks = model.pipeline.encode_prompt(list(prompts), device=model.device)
        # The stock pipeline fills prompts up to one length. The network ignores these tokens.
        return [
            {"tokens": row[mask].to(model.dtype)} for row, mask in zip(encoded, masks, strict=True)
        ]

    def token_limit(self, tokenizer: Any) -> int:
        return _TOKENS - _SUFFIX

    def codec(self, vae: Any, tile_pixels: int) -> Autoencoder:
        return one_frame(vae, tile_pixels)
