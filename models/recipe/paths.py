"""The paths of the recipe; everything under `build/` can be deleted and created again."""

from __future__ import annotations

import os
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1]
SOURCES = MODELS / "data" / "sources.csv"
BUILD = Path(os.environ.get("ATELIER_BUILD", MODELS / "build"))
DOWNLOADS = BUILD / "downloads"
PHOTOS = BUILD / "photos"
LATENTS = BUILD / "latents"
TEXT = BUILD / "text"
CHECKPOINTS = BUILD / "checkpoints"
REPORTS = Path(os.environ.get("ATELIER_REPORTS", MODELS / "reports"))
EXPORT = Path(
    os.environ.get(
        "ATELIER_EXPORT", MODELS.parent / "server" / "img2img_server" / "models" / "atelier"
    )
)
