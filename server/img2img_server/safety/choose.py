"""Which safety checker a worker runs."""

from __future__ import annotations

from img2img_server.safety.base import SafetyChecker
from img2img_server.safety.model import ModelChecker
from img2img_server.safety.nsfw import NsfwChecker
from img2img_server.settings import Settings


def safety_checker(settings: Settings, source: str) -> SafetyChecker:
    """The checker of the settings, not loaded yet. `source`: the model's directory or hub id."""
    return ModelChecker(source) if settings.safety_checker == "model" else NsfwChecker()
