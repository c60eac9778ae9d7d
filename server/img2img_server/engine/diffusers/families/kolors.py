"""Kolors: the UNet and the autoencoder of the SDXL kind, with ChatGLM3 as its text encoder."""

from __future__ import annotations

from typing import Any, ClassVar

from img2img_server.engine.diffusers.families.sdxl import StableDiffusionXL

_TOKENS = 256  # longest prompt in tokens, special tokens included, as in the stock pipeline


class Kolors(StableDiffusionXL):
    """Kolors and models derived from it."""

    name = "kolors"
    pipelines = dict.fromkeys(("KolorsPipeline", "KolorsImg2ImgPipeline"), "KolorsImg2ImgPipeline")
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    lora_parts: ClassVar[tuple[str, ...]] = ("unet",)
    num_inference_steps = 50
    guidance_scale = 5.0

    def token_limit(self, tokenizer: Any) -> int:
        return _TOKENS
