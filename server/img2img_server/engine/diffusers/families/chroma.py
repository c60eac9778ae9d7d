"""Chroma: packed latents as in FLUX.1, T5 prompts with a mask, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from img2img_server.engine.diffusers.families.base import Forward, LoadedModel
from img2img_server.engine.diffusers.families.flux import PackedFamily, predict_packed
from img2img_server.engine.distillation import Distillation
from img2img_server.engine.family import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor

# Chroma1-Flash runs 8 steps of Heun's method, which has two forwards for each, or 16 of Euler's.
_FLASH = Distillation(
    names=lambda name: name.describes("flash", needs_detail=True),
    num_inference_steps=16,
    guidance_scale=1.0,
    takes_named_steps=False,
)


class Chroma(PackedFamily):
    """Chroma1 and models derived from it."""

    name = "chroma"
    pipelines = dict.fromkeys(
        ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
        "ChromaImg2ImgPipeline",
    )
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    num_inference_steps = 35
    guidance_scale = 5.0

    def distillations(self, files: ModelFiles) -> Sequence[Distillation]:
        return (_FLASH,)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch
        from torch.nn.functional import pad

        height, width = forwards[0].latents.shape[2:]
        mask = torch.stack([forward.text.tensors["mask"] for forward in forwards])
        # All tokens of the image are attended to.
        whole = pad(mask, (0, height // 2 * (width // 2)), value=1.0)
        return predict_packed(model, forwards, attention_mask=whole)

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        tokens, _, mask, *_ = model.pipeline.encode_prompt(
            prompt=list(prompts),
            device=model.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.token_limit(model.pipeline.tokenizer),
        )
        tokens, mask = tokens.to(model.dtype), mask.to(model.dtype)
        return [
            {"tokens": row.clone(), "mask": mask_row.clone()}
            for row, mask_row in zip(tokens, mask, strict=True)
        ]
