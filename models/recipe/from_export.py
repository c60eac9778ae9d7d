"""Makes the packaged model the last checkpoint, so that training resumes from it.

`python -m recipe.from_export` writes encoder, decoder, denoiser and tokenizer into build/, as if
zero minutes had been spent; the package does not contain the state of the optimizers.
"""

from __future__ import annotations

import json
from pathlib import Path

from recipe import paths
from recipe.autoencoder import CHECKPOINT as DECODER
from recipe.checkpoint import lay_down, single
from recipe.encoder import ENCODER
from recipe.generate import pipeline
from recipe.runtime import save
from recipe.text import save_tokenizer
from recipe.train import CHECKPOINT as DENOISER


def lay_down_export(source: Path = paths.EXPORT) -> None:
    """Writes the checkpoint. Raises SystemExit if it would replace trained weights."""
    for path in (ENCODER, DECODER, DENOISER):
        if path.exists():
            raise SystemExit(
                f"{path} exists: move it to another folder to start from the packaged model"
            )
    tokenizer = json.loads((source / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    save_tokenizer(model["vocab"], merges)
    parts = pipeline(source)
    save(single(parts.vae.encoder.state_dict()), ENCODER)
    lay_down(DECODER, parts.vae.decoder.state_dict())
    text, unet = parts.text_encoder.state_dict(), parts.unet.state_dict()
    weights = {f"text.{name}": value for name, value in text.items()}
    lay_down(DENOISER, weights | {f"unet.{name}": value for name, value in unet.items()})
    print(f"training resumes from {source}")


if __name__ == "__main__":
    lay_down_export()
