"""Qwen-Image: packed latents, masked prompts, an autoencoder of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from img2img_server.engine.diffusers.families.base import FlowFamily, Forward, LoadedModel
from img2img_server.engine.diffusers.families.codecs import one_frame
from img2img_server.engine.diffusers.families.packing import pack, unpack
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.engine.diffusers.vae import Autoencoder

_TOKENS = 512  # longest prompt in tokens, as in the stock pipeline
_LIGHTNING = Distillation(
    names=lambda name: name.describes("lightning") or name.describes("turbo"),
    num_inference_steps=8,
    guidance_scale=1.0,
)
_DISTILLED = Distillation(  # Qwen-Image-Distill-Full
    names=lambda name: name.has(r"distill(?:ed)?"), num_inference_steps=15, guidance_scale=1.0
)
# The model was trained with a space for an empty negative prompt.
_EMPTY = " "


class QwenImage(FlowFamily):
    """Qwen-Image, Qwen-Image-2512 and models derived from them."""

    name = "qwen_image"
    pipelines = dict.fromkeys(
        ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        "QwenImageImg2ImgPipeline",
    )
    native_size = 1328
    lengths_vary = True
    num_inference_steps = 50
    guidance_scale = 4.0

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        return _LIGHTNING, _DISTILLED

    def stated_distillation(self, files: ModelFiles) -> Distillation | None:
        config = files.scheduler
        # Lightning models have one shift for all sizes, and their schedule is not stretched to a
        # terminal value.
        is_fixed = config.get("base_shift", 0.5) == config.get("max_shift", 1.15)
        return _LIGHTNING if is_fixed and not config.get("shift_terminal") else None

    def combine(self, prompted: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        mixed = negative + scale * (prompted - negative)
        return mixed * (_token_norm(prompted) / _token_norm(mixed))

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        latents = torch.cat([forward.latents for forward in forwards]).to(model.dtype)
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        texts = [forward.text.tensors["tokens"] for forward in forwards]
        mask = None
        if len({len(text) for text in texts}) > 1:
            ones = [torch.ones(len(text), dtype=torch.bool, device=model.device) for text in texts]
            mask = pad_sequence(ones, batch_first=True)
        output = model.network(
            hidden_states=pack(latents),
            encoder_hidden_states=pad_sequence(texts, batch_first=True),
            encoder_hidden_states_mask=mask,
            timestep=torch.cat([forward.timestep for forward in forwards]) / 1000,
            img_shapes=[[(1, height, width)]] * len(forwards),
            return_dict=False,
        )[0]
        return torch.split(unpack(output.float(), height, width), 1)

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        encoded, mask = model.pipeline.encode_prompt(
            [prompt or _EMPTY for prompt in prompts],
            device=model.device,
            max_sequence_length=_TOKENS,
        )
        rows = (
            encoded
            if mask is None
            else [row[own.bool()] for row, own in zip(encoded, mask, strict=True)]
        )
        return [{"tokens": row.to(model.dtype, copy=True)} for row in rows]

    def token_limit(self, tokenizer: Any) -> int:
        return _TOKENS

    def codec(self, vae: Any, tile_pixels: int) -> Autoencoder:
        return one_frame(vae, tile_pixels)


def _token_norm(outputs: Tensor) -> Tensor:
    """Returns the norm of each token of 2 x 2 latents, repeated for each of its latents."""
    from torch.nn.functional import avg_pool2d

    squares = outputs.square().sum(dim=1, keepdim=True)
    norms = (4 * avg_pool2d(squares, 2)).sqrt()
    return norms.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
