"""The safety checker of diffusers, from the folder safety_checker of a model's directory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from img2img_server.domain.hub_id import HubId
from img2img_server.imaging.base import Pixels
from img2img_server.safety.base import LazyChecker


class ModelChecker(LazyChecker):
    """Returns 1.0 for an image that the model's checker would blank and 0.0 for any other.

    Runs on the CPU, in full precision and one image at a time: the device belongs to the engine's
    thread.

    Args:
        source: a diffusers directory or hub id.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source
        self.turn = asyncio.Lock()

    def load(self) -> Callable[[Pixels], float]:
        from diffusers.pipelines.stable_diffusion.safety_checker import (
            StableDiffusionSafetyChecker,  # Importing torch takes seconds.
        )
        from transformers import CLIPImageProcessorPil

        from img2img_server.default_dtype import DEFAULT_DTYPE

        hub_id = None if Path(self._source).is_dir() else HubId.parse(self._source)
        source, revision = self._source, "main"
        if hub_id is not None:
            source, revision = hub_id.repo, hub_id.revision or "main"
        with DEFAULT_DTYPE.restored():
            checker: Any = StableDiffusionSafetyChecker.from_pretrained(
                source, subfolder="safety_checker", revision=revision
            )
        checker.eval()
        prepare = CLIPImageProcessorPil.from_pretrained(
            source, subfolder="feature_extractor", revision=revision
        )
        # A thread may outlive the check that started it, so a lock in the threads keeps the checks
        # sequential.
        one_at_a_time = threading.Lock()

        def score(pixels: Pixels) -> float:
            with one_at_a_time:
                ready = prepare(images=Image.fromarray(pixels), return_tensors="pt").pixel_values
                # The checker blanks its input images; only its flags are used.
                with DEFAULT_DTYPE.normal():
                    _, flagged = checker(clip_input=ready, images=[np.zeros(1)])
                return float(bool(flagged[0]))

        return score
