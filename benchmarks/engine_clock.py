"""Measures the time that the networks of a pipeline run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from img2img_server.engine.diffusers.placement import modules


class Clock:
    """Adds up the seconds in denoiser, autoencoder and text encoders of one pipeline.

    On a GPU, calls return before the work is done, so the sum has no meaning there.
    """

    def __init__(self, pipeline: Any) -> None:
        self.seconds = 0.0
        for name, network in modules(pipeline).items():
            methods = ("encode", "decode") if name == "vae" else ("forward",)
            for method in methods:
                self._watch(network, method)

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
