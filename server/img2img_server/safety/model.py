"""The safety checker that a model directory brings: diffusers' own, in folder safety_checker."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import structlog
from PIL import Image

from img2img_server.errors import SafetyCheckError
from img2img_server.imaging.base import Pixels

log = structlog.get_logger(__name__)


class ModelChecker:
    """Gives 1.0 to a picture that the model's checker would blank and 0.0 to any other.

    Runs on the CPU, in full precision and one picture at a time: the device belongs to the engine's
    thread.

    Args:
        source: a diffusers directory or hub id.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._parts: tuple[Any, Any] | None = None  # the checker, and what prepares its input
        self._lock = threading.Lock()  # also against a check whose caller has gone
        self.turn = asyncio.Lock()  # those who wait take no thread from anybody else

    async def warm_up(self) -> None:
        await asyncio.to_thread(self._load)

    def check(self, pixels: Pixels) -> float:
        checker, prepare = self._load()
        with self._lock:
            try:
                ready = prepare(images=Image.fromarray(pixels), return_tensors="pt").pixel_values
                # What it blanks is its second argument; its answer is all that we want.
                _, flagged = checker(clip_input=ready, images=[np.zeros(1)])
                return float(bool(flagged[0]))
            except Exception as error:
                log.exception("safety check cannot run")
                raise SafetyCheckError("the safety check cannot run") from error

    def _load(self) -> tuple[Any, Any]:
        with self._lock:
            if self._parts is None:
                try:
                    self._parts = _load(self._source)
                except Exception as error:
                    log.exception("safety checker not loaded")
                    text = "the model's safety checker cannot be loaded"
                    raise SafetyCheckError(text) from error
            return self._parts


def _load(source: str) -> tuple[Any, Any]:
    """Imports late: torch takes seconds."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    checker: Any = StableDiffusionSafetyChecker.from_pretrained(source, subfolder="safety_checker")
    prepare = CLIPImageProcessorPil.from_pretrained(source, subfolder="feature_extractor")
    return checker.eval(), prepare
