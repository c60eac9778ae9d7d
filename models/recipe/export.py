"""Writes the model as a diffusers pipeline directory, fp16, with the service's model file.

`python -m recipe.export` takes the averaged weights of the last checkpoints; with `--if-newer` only
when they are newer than the directory.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from recipe import card, paths
from recipe.autoencoder import CHECKPOINT as DECODER
from recipe.autoencoder import load_autoencoder
from recipe.checkpoint import averaged
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
        steps_offset=1,  # This has no effect with trailing steps, but with 0 diffusers would warn.
    )


def trained_denoiser() -> Denoiser:
    weights = averaged(CHECKPOINT)
    model = Denoiser()
    model.load_state_dict(weights)
    return model.eval()


def _write(target: Path) -> None:
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
    # The text encoder stays float32: without a dtype, transformers would load it in the stored
    # dtype, but diffusers loads all other parts as float32.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(target, safe_serialization=True)
    for name in ("img2img.toml", "MODEL_CARD.md"):
        shutil.copy(paths.MODELS / name, target / name)
    (target / "NOTICE").write_text(card.notice(), encoding="utf-8")


def export(target: Path = paths.EXPORT) -> None:
    """Replaces the directory by a complete one within the limit; otherwise raises SystemExit."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as fresh:
        made = Path(fresh, target.name)
        _write(made)
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        print(f"{target.name}: {size / 2**20:.1f} MiB")
        if size > LIMIT_BYTES:
            raise SystemExit(f"the export is larger than {LIMIT_BYTES} bytes")
        if target.exists():
            target.rename(Path(fresh, "before"))
        made.rename(target)


def is_newer(target: Path = paths.EXPORT) -> bool:
    """Returns whether a trained model is newer than the directory."""
    if not (CHECKPOINT.exists() and DECODER.exists()):
        return False
    written = target / "model_index.json"
    reached = max(path.stat().st_mtime for path in (CHECKPOINT, DECODER))
    return not written.exists() or reached > written.stat().st_mtime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--if-newer", action="store_true")
    if not parser.parse_args().if_newer or is_newer():
        export()
