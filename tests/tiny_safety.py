"""A small safety checker with random weights, in the directory layout of real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from img2img_server.imaging.base import Pixels

SIDE, WIDTH = 32, 16


def write_checker(folder: Path, *, margin: float, photo: Pixels) -> Path:
    """Writes a model directory whose checker finds one concept in `photo`, with this margin of the
    cosine. With a margin below 0 it does not find the concept; from 2 on it finds it in every
    image.
    """
    torch.manual_seed(3)
    small = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config={**small, "num_attention_heads": 2},
        vision_config={
            **small,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        projection_dim=WIDTH,
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    with torch.no_grad():
        ready = prepare(images=photo, return_tensors="pt").pixel_values
        embedding = checker.visual_projection(checker.vision_model(ready)[1])
        checker.concept_embeds[0] = embedding[0]  # The cosine of this photo with itself is 1.
        checker.concept_embeds_weights[:] = 2.0  # No cosine reaches this threshold.
        checker.concept_embeds_weights[0] = 1.0 - margin
        checker.special_care_embeds_weights[:] = 2.0
    checker.save_pretrained(folder / "safety_checker")
    prepare.save_pretrained(folder / "feature_extractor")
    return folder
