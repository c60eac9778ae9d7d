"""Writes the model as a diffusers pipeline directory, fp16, with the service's model file.

`python -m recipe.export` takes the averaged weights of the last checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from recipe import card, paths
from recipe.autoencoder import load_autoencoder
from recipe.schedule import STEPS, betas
from recipe.train import CHECKPOINT, Denoiser

LIMIT_BYTES = 32 * 2**20


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=STEPS,
        trained_betas=betas(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused with trailing steps; 0 makes diffusers warn
    )


def trained_denoiser() -> Denoiser:
    model = Denoiser()
    state = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    model.load_state_dict(state["average"])
    return model.eval()


def export(target: Path = paths.EXPORT) -> None:
    denoiser = trained_denoiser()
    pipeline = StableDiffusionImg2ImgPipeline(
        vae=load_autoencoder(),
        text_encoder=denoiser.text,
        tokenizer=denoiser.tokenizer,
        unet=denoiser.unet.to(memory_format=torch.contiguous_format),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if target.exists():
        shutil.rmtree(target)
    # The text encoder stays fp32: transformers would load it in the dtype it finds, diffusers
    # loads the rest as fp32, and the two must fit when nobody names a dtype.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(target, safe_serialization=True)
    shutil.copy(paths.MODELS / "img2img.toml", target / "img2img.toml")
    (target / "NOTICE").write_text(card.notice(), encoding="utf-8")
    if (paths.MODELS / "MODEL_CARD.md").exists():
        shutil.copy(paths.MODELS / "MODEL_CARD.md", target / "MODEL_CARD.md")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target.name}: {size / 2**20:.1f} MiB")
    if size > LIMIT_BYTES:
        raise SystemExit(f"the export is larger than {LIMIT_BYTES} bytes")


if __name__ == "__main__":
    export()
