"""ERNIE-Image: one stream of image and text tokens, latents of 128 channels.

Diffusers has no image-to-image pipeline for it; the init image is noised as in other families with
flow matching. The model's language model that rewrites prompts is not loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.engine.diffusers.families.base import FlowFamily, Forward, LoadedModel
from img2img_server.engine.diffusers.families.codecs import patches
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.engine.diffusers.vae import Autoencoder

_TURBO = Distillation(
    names=lambda name: name.describes("turbo"), num_inference_steps=8, guidance_scale=1.0
)
# The stock pipeline has this number instead of the autoencoder's own.
_EPSILON = 1e-5


class ErnieImage(FlowFamily):
    """ERNIE-Image, ERNIE-Image-Turbo and models derived from them."""

    name = "ernie_image"
    unbatched_layers = r"layers\.\d+\.mlp\..*|final_linear"
    pipelines: ClassVar[Mapping[str, str]] = {"ErnieImagePipeline": "ErnieImagePipeline"}
    load_options: ClassVar[Mapping[str, Any]] = {"pe": None, "pe_tokenizer": None}
    lengths_vary = True
    num_inference_steps = 50
    guidance_scale = 4.0

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        return (_TURBO,)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        texts = [forward.text.tensors["tokens"] for forward in forwards]
        output = model.network(
            hidden_states=torch.cat([forward.latents for forward in forwards]).to(model.dtype),
            timestep=torch.cat([forward.timestep for forward in forwards]).to(model.dtype),
            text_bth=pad_sequence(texts, batch_first=True),
            text_lens=torch.cat([forward.text.tensors["length"] for forward in forwards]),
            return_dict=False,
        )[0]
        return torch.split(output.float(), 1)

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        import torch

        rows = model.pipeline.encode_prompt(list(prompts), device=model.device)
        return [
            {"tokens": row.to(model.dtype), "length": torch.tensor([len(row)], device=row.device)}
            for row in rows
        ]

    def codec(self, vae: Any, tile_pixels: int) -> Autoencoder:
        return patches(vae, tile_pixels, _EPSILON)
