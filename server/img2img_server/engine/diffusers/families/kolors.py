"""Kolors: the UNet and the autoencoder of the SDXL kind, with ChatGLM3 as its text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from img2img_server.engine.diffusers.families.sdxl import StableDiffusionXL

if TYPE_CHECKING:
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

    def clip_encoders(self, model: LoadedModel) -> Sequence[ClipEncoder]:
        return ()

    def token_limit(self, tokenizer: Any) -> int:
        return _TOKENS
