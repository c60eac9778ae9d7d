"""The interface of safety checkers, and what their implementations share."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import structlog

from img2img_server.errors import SafetyCheckError
from img2img_server.imaging.base import Pixels

log = structlog.get_logger(__name__)


class SafetyChecker(Protocol):
    """Scores finished images. May be called from several threads."""

    async def warm_up(self) -> None:
        """Loads the model, so that the first check need not wait for it.

        Raises:
            SafetyCheckError: the checker cannot run on this machine.
        """
        ...

    @property
    def turn(self) -> AbstractAsyncContextManager[None]:
        """A context that limits parallel checks. Enter it before a thread is taken, so that no
        thread waits.
        """
        ...

    def check(self, pixels: Pixels) -> float:
        """Returns a score from 0 (safe for work) to 1 (not safe). Blocks while it computes.

        Args:
            pixels: height x width x 3, RGB.

        Raises:
            SafetyCheckError: the checker cannot run; the job must fail.
        """
        ...


class LazyChecker(ABC):
    """A SafetyChecker that loads its model before the first check."""

    def __init__(self) -> None:
        # By default, checks run in parallel.
        self.turn: AbstractAsyncContextManager[None] = nullcontext()
        self._score: Callable[[Pixels], float] | None = None
        self._loading = threading.Lock()

    @abstractmethod
    def load(self) -> Callable[[Pixels], float]:
        """Imports the libraries and loads the model; returns the function that scores an image."""

    async def warm_up(self) -> None:
        await asyncio.to_thread(self._loaded)

    def check(self, pixels: Pixels) -> float:
        score = self._loaded()
        with _safety_check_error("the safety check cannot run"):
            return score(pixels)

    def _loaded(self) -> Callable[[Pixels], float]:
        with self._loading, _safety_check_error("the safety checker cannot be loaded"):
            if self._score is None:
                self._score = self.load()
            return self._score


@contextmanager
def _safety_check_error(sentence: str) -> Iterator[None]:
    """Replaces an error of the body by SafetyCheckError with this sentence, and logs the error."""
    try:
        yield
    except Exception as error:
        log.exception("safety_check_failed", error=sentence)
        raise SafetyCheckError(sentence) from error


def blank(pixels: Pixels) -> Pixels:
    """Returns a black image of the same size, the replacement of a flagged image."""
    return np.zeros(pixels.shape, np.uint8)
