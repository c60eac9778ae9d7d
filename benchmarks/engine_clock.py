"""Measures the time that the networks of a pipeline run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any


class Clock:
    """Adds up the seconds in UNet, autoencoder and text encoders of one pipeline.

    On a GPU, calls return before the work is done, so the sum has no meaning there.
    """

    def __init__(self, pipeline: Any) -> None:
        self.seconds = 0.0
        self._watch(pipeline.unet, "forward")
        self._watch(pipeline.vae, "encode")
        self._watch(pipeline.vae, "decode")
        for name in ("text_encoder", "text_encoder_2"):
            if (encoder := getattr(pipeline, name, None)) is not None:
                self._watch(encoder, "forward")

    def _watch(self, module: Any, method: str) -> None:
        work: Callable[..., Any] = getattr(module, method)

        @functools.wraps(work)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(module, method, timed)
