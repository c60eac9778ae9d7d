"""Z-Image and Z-Image-Turbo: one stream of image and text tokens, lists of unequal lengths."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from img2img_server.domain.models import Guidance
from img2img_server.engine.diffusers.families.base import FlowFamily, Forward, LoadedModel
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.engine.denoiser import TextInput

_TOKENS = 512  # longest prompt in tokens, with its chat template, as in the stock pipeline
# Turbo has a shift of 3. The model that it was distilled from has a shift of 6.
_TURBO_SHIFT = 3.0
_TURBO = Distillation(
    names=lambda name: name.describes("turbo"), num_inference_steps=8, guidance_scale=0.0
)


class ZImage(FlowFamily):
    """Z-Image, Z-Image-Turbo and models derived from them."""

    name = "z_image"
    unbatched_layers = r"(all_x|cap)_embedder\..*"
    pipelines = dict.fromkeys(
        ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        "ZImageImg2ImgPipeline",
    )
    original_names = (
        *((rf"(.*)\.attention\.to_{name}", r"\1.attention.qkv") for name in "qkv"),
        (r"(.*)\.attention\.to_out\.0", r"\1.attention.out"),
        (r"all_x_embedder\.2-1", "x_embedder"),
        (r"all_final_layer\.2-1\.(.*)", r"final_layer.\1"),
    )
    lengths_vary = True
    num_inference_steps = 28
    guidance_scale = 4.0

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        return (_TURBO,)

    def stated_distillation(self, files: ModelFiles) -> Distillation | None:
        shift = float(files.scheduler.get("shift") or 0)
        return _TURBO if shift == _TURBO_SHIFT else None

    def refusal(self, files: ModelFiles) -> str:
        if files.config("transformer").get("siglip_feat_dim") is None:
            return ""
        return "Z-Image-Omni takes images as conditions, which is not served"

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        return Guidance.CLASSIFIER_FREE_FROM_ZERO

    def batch_key(self, text: TextInput) -> Hashable:
        # The network pads all rows to the longest one: sizes of up to twice the tokens share a
        # forward, and no row costs more than twice what it costs alone.
        return (self.image_tokens(text.height, text.width) - 1).bit_length()

    def combine(self, prompted: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        return prompted + scale * (prompted - negative)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch

        outputs = model.network(
            [forward.latents[0].to(model.dtype).unsqueeze(1) for forward in forwards],
            (1000 - torch.cat([forward.timestep for forward in forwards])) / 1000,
            [forward.text.tensors["tokens"] for forward in forwards],
            return_dict=False,
        )[0]
        return [-output.float().squeeze(1)[None] for output in outputs]

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        encoded, _ = model.pipeline.encode_prompt(
            list(prompts),
            device=model.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_TOKENS,
        )
        return [{"tokens": tokens.to(model.dtype)} for tokens in encoded]

    def token_limit(self, tokenizer: Any) -> int:
        message = [{"role": "user", "content": "\0"}]
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        before, _, _ = text.partition("\0")
        return _TOKENS - len(tokenizer(before)["input_ids"])
