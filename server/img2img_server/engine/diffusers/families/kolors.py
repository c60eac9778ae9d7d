"""Kolors: the UNet and the autoencoder of the SDXL kind, with ChatGLM3 as its text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.engine.diffusers.families.sdxl import StableDiffusionXL
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.engine.diffusers.families.base import LoadedModel
    from img2img_server.engine.diffusers.windows import ClipEncoder

_TOKENS = 256  # longest prompt in tokens, special tokens included, as in the stock pipeline


class Kolors(StableDiffusionXL):
    """Kolors and models derived from it."""

    name = "kolors"
    pipelines = dict.fromkeys(("KolorsPipeline", "KolorsImg2ImgPipeline"), "KolorsImg2ImgPipeline")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    lora_parts: ClassVar[tuple[str, ...]] = ("unet",)
    takes_prompt_weights = False
    num_inference_steps = 50
    guidance_scale = 5.0

    def encode_skipping(
        self, model: LoadedModel, prompts: Sequence[str], clip_skip: int
    ) -> list[Mapping[str, Tensor]]:
        return self.encode_prompts(model, prompts, [False] * len(prompts))

    def clip_encoders(self, model: LoadedModel) -> Sequence[ClipEncoder]:
        return ()

    def max_clip_skip(self, files: ModelFiles) -> int:
        return 0

    def token_limit(self, tokenizer: Any) -> int:
        return _TOKENS
