"""Safety checkers of generated images."""

from __future__ import annotations

from img2img_server.safety.base import SafetyChecker
from img2img_server.safety.model import ModelChecker
from img2img_server.safety.nsfw import NsfwChecker
from img2img_server.settings import Settings


def safety_checker(settings: Settings, source: str) -> SafetyChecker:
    """Returns the checker that the settings choose; it loads its model later. `source`: model
    directory or hub id.
    """
    return ModelChecker(source) if settings.safety_checker == "model" else NsfwChecker()
